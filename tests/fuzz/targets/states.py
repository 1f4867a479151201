"""Target: saved training states. The first line names a file, the rest is its content.

If the name is followed by ` sealed`, the content of state.json gets the checksums that it should have.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from spectune.training import state
from spectune.training.optim.groups import build_optimizer
from spectune.training.resume.newest import load_newest
from tests.fuzz import seeds
from tests.fuzz.mutation import change_bytes, change_json, mutated, odd_values, text_bytes

SEALED = " sealed"
SHAPES = {"a.down": (2, 8), "a.up": (8, 2)}


class States:
    """A state of a training, which is read and restored."""

    name = "states"
    is_for_bytes = True

    def seeds(self) -> Sequence[bytes]:
        return [f"{path.name}\n".encode() + path.read_bytes() for path in sorted(_state().iterdir())]

    def inputs(self) -> SearchStrategy[bytes]:
        document = json.loads((_state() / state.STATE).read_bytes())

        def bytes_changed(seed: bytes, random: Random) -> bytes:
            name, _, content = seed.partition(b"\n")
            return name + b"\n" + change_bytes(content, random)

        values = mutated([document], change_json) | odd_values
        documents = values.map(lambda value: text_bytes(json.dumps(value)))
        sealed = documents.map(lambda content: f"{state.STATE}{SEALED}\n".encode() + content)
        edited = documents.map(lambda content: f"{state.STATE}\n".encode() + content)
        names = [path.name for path in _state().iterdir()]
        tensors = st.builds(
            lambda name, data: f"{name}{SEALED}\n".encode() + data,
            st.sampled_from([name for name in names if name != state.STATE]),
            mutated([seeds.small_file()], change_bytes) | st.just(seeds.small_file()) | st.just(seeds.lora()),
        )
        return sealed | sealed | edited | tensors | mutated(self.seeds(), bytes_changed)

    def write(self, folder: Path, data: bytes) -> None:
        first, _, content = data.partition(b"\n")
        name = first.decode(errors="replace").removesuffix(SEALED)
        if name not in {path.name for path in _state().iterdir()}:
            name, content = state.STATE, data
        target = folder / _state().name
        shutil.copytree(_state(), target)
        (target / name).write_bytes(content)
        if first.endswith(SEALED.encode()):
            _seal(target)

    def operate(self, folder: Path) -> None:
        saved, _ = load_newest([folder / _state().name])
        assert saved is not None
        trained, optimizer = _trained()
        saved.restore(trained, optimizer)

    def arguments(self, folder: Path) -> None:
        return None


def _trained() -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    trained = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
    return trained, build_optimizer("adamw", [{"params": list(trained.values())}])


@cache
def _state() -> Path:
    """Return the folder of a valid state."""
    folder = seeds.folder() / "x-step00000003.state"
    trained, optimizer = _trained()
    for tensor in trained.values():
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    header = state.StateHeader(
        step=3,
        steps=10,
        position=6,
        recipe={"run": {"batch": 2, "steps": 10}},
        base_hash="b" * 64,
        frame_hash="f" * 64,
        data_hash="d",
        validation_before=None,
        optimizer_package="torch",
        changes=({"step": 2, "key": "run.batch", "before": 1, "after": 2},),
    )
    state.save_state(
        folder, header, trained, optimizer, extras={"ema": {"steps": 3, "average": torch.ones(2)}}
    )
    return folder


def _seal(folder: Path) -> None:
    """Write the checksums that the files of a state should have."""
    try:
        document: Any = json.loads((folder / state.STATE).read_bytes())
    except (ValueError, RecursionError):
        return
    if not isinstance(document, dict):
        return
    files = {path.name: state._file_hash(path) for path in folder.iterdir() if path.name != state.STATE}
    if isinstance(document.get("files"), dict):
        document["files"] |= files
    document.pop(state._CHECKSUM, None)
    document[state._CHECKSUM] = state._text_hash(json.dumps(document))
    (folder / state.STATE).write_text(json.dumps(document))
