"""Targets: the bytes of safetensors files, and the metadata in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from spectune.files.reader import open_file
from spectune.ops.inspect import inspect
from tests.fuzz import seeds
from tests.fuzz.mutation import change_bytes, change_json, mutated, odd_values, text_bytes
from tests.fuzz.safetensors_bytes import assemble, build, entries, parse

FILE = "x.safetensors"


class TensorFiles:
    """The reader: every tensor of a file is read."""

    name = "safetensors"
    is_for_bytes = True

    def seeds(self) -> Sequence[bytes]:
        return [seeds.small_file(), seeds.lora()]

    def inputs(self) -> SearchStrategy[bytes]:
        header, body = parse(seeds.small_file())
        odd_headers = st.builds(build, mutated([header], change_json) | odd_values, st.just(body))
        return mutated(self.seeds(), change_bytes) | odd_headers | st.binary(max_size=200)

    def write(self, folder: Path, data: bytes) -> None:
        (folder / FILE).write_bytes(data)

    def operate(self, folder: Path) -> None:
        with open_file(folder / FILE) as file:
            _ = file.provenance
            for name in file.tensors:
                file.load(name)

    def arguments(self, folder: Path) -> list[str]:
        return ["inspect", FILE]


class Metadata:
    """Metadata as JSON in a LoRA, which `inspect` shows."""

    name = "metadata"
    is_for_bytes = False

    def seeds(self) -> Sequence[bytes]:
        return [json.dumps(seeds.METADATA).encode(), b"{}"]

    def inputs(self) -> SearchStrategy[bytes]:
        texts = st.dictionaries(
            st.sampled_from([*seeds.METADATA, *_OTHER_KEYS]) | st.text(max_size=10),
            odd_values.map(lambda value: value if isinstance(value, str) else json.dumps(value)),
            max_size=4,
        )
        changed = mutated([seeds.METADATA], _change_one, most=3)
        return (texts | changed).map(lambda value: text_bytes(json.dumps(value)))

    def write(self, folder: Path, data: bytes) -> None:
        metadata = json.loads(data)  # ValueError for others
        tensors, _ = entries(seeds.lora())
        (folder / FILE).write_bytes(assemble(tensors, metadata))

    def operate(self, folder: Path) -> None:
        inspect(folder / FILE)

    def arguments(self, folder: Path) -> list[str]:
        return ["inspect", FILE]


_OTHER_KEYS = (
    *("spectune.layout", "spectune.adapters", "spectune.slices", "spectune.merged", "spectune.flow_shift"),
    *("spectune.vae_shift", "spectune.frame", "spectune.principal_hash", "modelspec.predict_key"),
    *("modelspec.title", "ss_network_module", "sshs_model_hash", "workflow", "prompt"),
)


def _change_one(metadata: dict[str, Any], random: Random) -> dict[str, Any]:
    """Change an entry of the metadata, or the JSON value inside of it."""
    key = random.choice(list(metadata)) if metadata else "format"
    try:
        inner = json.loads(metadata[key])
    except (KeyError, TypeError, ValueError):
        inner = None
    if isinstance(inner, dict) and random.random() < 0.7:
        return {**metadata, key: json.dumps(change_json(inner, random))}
    changed = change_json(metadata, random)
    return changed if isinstance(changed, dict) else metadata
