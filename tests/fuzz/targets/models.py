"""Targets: models and adapters with odd names, shapes, dtypes and values; and diffusers folders.

An input has one JSON value on each line: the name of an operation, then changes of a valid file.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from spectune.ops.convert import convert
from tests.fuzz import seeds
from tests.fuzz.harness import run_command
from tests.fuzz.mutation import change_json, mutated, odd_values, text_bytes
from tests.fuzz.safetensors_bytes import SIZES, assemble, entries, filled

TO_FILE = ["-o", "out.safetensors"]
FEW = ["--layers", "te1", "--layers", "unet.middle_block.1.*"]
# X is the file that is tried, BASE a valid model, LORA a valid LoRA.
OF_MODELS = {
    "inspect": ["inspect", "x.safetensors"],
    "split": ["split", "x.safetensors", "--rank", "2", *FEW, "-o", "out"],
    "rebuild": ["rebuild", "x.safetensors", "lora.safetensors", *TO_FILE],
    "export": ["export", "base.safetensors", "x.safetensors", "--rank", "2", *FEW, *TO_FILE],
    "slice": ["slice", "x.safetensors:te", "base.safetensors:unet", "base.safetensors:vae", *TO_FILE],
    "merge": ["merge", "x.safetensors:0.5", "base.safetensors:0.5", *TO_FILE],
    "null": ["null", "x.safetensors", *TO_FILE],
    "convert": ["convert", "x.safetensors", "-o", "out"],
}
OF_ADAPTERS = {
    "inspect": ["inspect", "x.safetensors"],
    "rebuild": ["rebuild", "base.safetensors", "x.safetensors", *TO_FILE],
    "export": ["export", "base.safetensors", "x.safetensors", *TO_FILE],
    "slice": ["slice", "x.safetensors:te", "--base", "base.safetensors", *TO_FILE],
    "convert": ["convert", "x.safetensors", "--keys", "diffusers", "--base", "base.safetensors", *TO_FILE],
}
AFFIXES = ("", "model.", "lora_unet_", "lora_te1_", "model.diffusion_model.", "first_stage_model.", "unet.")
SUFFIXES = (
    *(".weight", ".bias", ".alpha", ".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".diff"),
    *(".hada_w1_a", ".lokr_w1", ".lokr_w2_a", ".dora_scale", ".oft_blocks", ".oft_diag", ".on_input", "."),
    *(".frame_down.weight", ".delta_up.weight", ".scale_weight", ".reshape_weight", ".bias_residual", ""),
)
CHANGES = ("drop", "rename", "copy", "shape", "dtype", "fill", "metadata", "suffix", "keep")


class Models:
    """Full models, through the commands that read one."""

    name = "models"
    is_for_bytes = False
    operations = OF_MODELS

    def valid(self) -> bytes:
        return seeds.model()

    def seeds(self) -> Sequence[bytes]:
        # `export` refuses two equal models
        change = json.dumps(["fill", _first_weight(self.valid()), 0.0])
        return [f"{json.dumps(name)}\n{change}".encode() for name in self.operations]

    def inputs(self) -> SearchStrategy[bytes]:
        tensors, _ = entries(self.valid())
        # Rare kinds of tensors, such as embeddings, are chosen as often as frequent ones.
        kinds = defaultdict[str, list[str]](list)
        for name in tensors:
            kinds[re.sub(r"\d+", "", name)].append(name)
        groups = list(kinds.values())

        def build(operation: str, random: Random, count: int) -> bytes:
            changes = [_change(groups, random) for _ in range(count)]
            return "\n".join(json.dumps(line) for line in [operation, *changes]).encode()

        operations = [*self.operations, *["inspect"] * 4]  # the fastest one
        return st.builds(
            build, st.sampled_from(operations), st.randoms(use_true_random=True), st.integers(1, 4)
        )

    def write(self, folder: Path, data: bytes) -> None:
        operation, *changes = [json.loads(line) for line in data.splitlines()]
        if operation not in self.operations:
            raise ValueError(operation)
        (folder / "operation").write_text(operation)
        (folder / "base.safetensors").write_bytes(seeds.model())
        (folder / "lora.safetensors").write_bytes(seeds.lora())
        (folder / "x.safetensors").write_bytes(changed_file(self.valid(), changes))

    def operate(self, folder: Path) -> None:
        run_command(self.arguments(folder))

    def arguments(self, folder: Path) -> list[str]:
        return self.operations[(folder / "operation").read_text()]


class Adapters(Models):
    """LoRA files, through the commands that read an adapter."""

    name = "adapters"
    operations = OF_ADAPTERS

    def valid(self) -> bytes:
        return seeds.lora()


def _first_weight(data: bytes) -> str:
    return next(name for name in entries(data)[0] if "q_proj" in name and name.endswith("weight"))


def _change(groups: Sequence[Sequence[str]], random: Random) -> list[Any]:
    """Return one change: its kind, the name of a tensor, and a value."""
    kind, name = random.choice(CHANGES), random.choice(random.choice(groups))
    match kind:
        case "shape":
            axes = random.choice((0, 1, 1, 2, 2, 3, 4, 5))
            return [kind, name, [random.choice((0, 1, 2, 3, 16, 24, 2**40, 10**30)) for _ in range(axes)]]
        case "dtype":
            return [kind, name, random.choice([*SIZES, "F4", ""])]
        case "fill":
            return [kind, name, random.choice([float("nan"), float("inf"), 2.0, 0.0])]
        case "rename" | "copy":
            other = random.choice(random.choice(groups))
            other = random.choice(AFFIXES) + other + random.choice(("", "", ".weight", "x"))
            return [kind, name, other]
        case "metadata":
            changed = change_json({key: seeds.METADATA[key] for key in seeds.METADATA}, random)
            return [kind, name, changed]
        case "suffix":
            return [kind, name, random.choice(SUFFIXES)]
        case _:
            return [kind, random.choice((name, name.split(".")[0], name.rpartition(".")[0]))]


def changed_file(data: bytes, changes: Sequence[Any]) -> bytes:
    """Return a file with changes. Raise ValueError for one that does not fit, such as an unknown name."""
    tensors, metadata = entries(data)
    for kind, name, *rest in changes:
        if kind in ("drop", "keep"):
            tensors = {key: one for key, one in tensors.items() if key.startswith(name) == (kind == "keep")}
        elif kind == "metadata":
            metadata = rest[0]
        elif name in tensors:
            tensors = _one_changed(tensors, kind, name, rest[0])
    return assemble(tensors, metadata)


Tensors = dict[str, tuple[str, list[int], bytes]]


def _one_changed(tensors: Tensors, kind: str, name: str, value: Any) -> Tensors:
    dtype, shape, _ = tensors[name]
    match kind:
        case "shape":
            shape = [int(n) for n in value]
            filling = filled(dtype, shape, 0.0)
        case "dtype":
            dtype = str(value)
            filling = filled(dtype, shape, 0.0)
        case "fill":
            filling = filled(dtype, shape, float(value))
        case "copy":
            return {**tensors, str(value): tensors[name]}
        case _:
            new = name.rpartition(".")[0] + str(value) if kind == "suffix" else str(value)
            return {new if key == name else key: one for key, one in tensors.items()}
    return tensors if filling is None else {**tensors, name: (dtype, shape, filling)}


class Folders:
    """Diffusers folders with a wrong JSON file. The first line is its name, the rest its content."""

    name = "folders"
    is_for_bytes = False

    def valid(self) -> Path:
        """Return a diffusers folder."""
        folder = seeds.folder() / "diffusers"
        if not folder.exists():
            model = seeds.folder() / "model.safetensors"
            model.write_bytes(seeds.model())
            convert(model, folder)
        return folder

    def files(self) -> list[str]:
        folder = self.valid()
        found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.json"))
        return [name for name in found if (folder / name).stat().st_size < 10_000]

    def seeds(self) -> Sequence[bytes]:
        return [f"{name}\n".encode() + (self.valid() / name).read_bytes() for name in self.files()]

    def inputs(self) -> SearchStrategy[bytes]:
        contents = {name: json.loads((self.valid() / name).read_bytes()) for name in self.files()}

        def changed(name: str) -> SearchStrategy[bytes]:
            values = mutated([contents[name]], change_json, most=3) | odd_values
            return values.map(lambda value: f"{name}\n".encode() + text_bytes(json.dumps(value)))

        return st.sampled_from(list(contents)).flatmap(changed)

    def write(self, folder: Path, data: bytes) -> None:
        name, _, content = data.partition(b"\n")
        if name.decode() not in self.files():
            raise ValueError(name)
        shutil.copytree(self.valid(), folder / "model")
        (folder / "model" / name.decode()).write_bytes(content)

    def operate(self, folder: Path) -> None:
        run_command(self.arguments(folder))

    def arguments(self, folder: Path) -> list[str]:
        return ["inspect", "model"]
