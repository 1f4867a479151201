from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.provenance import Provenance
from spectune.files.source import MemorySource, TensorInfo
from spectune.sdxl.inference import infer_layout, layout_of
from spectune.sdxl.layout import read_hints
from tests.layouts import FULL, TINY


def test_the_full_layout_needs_no_metadata(full_infos: Mapping[str, TensorInfo]) -> None:
    assert layout_of(full_infos) == FULL


def test_the_tiny_layout_is_inferred_with_its_metadata(tiny_checkpoint: Path) -> None:
    with open_checkpoint(tiny_checkpoint) as source:
        assert infer_layout(source) == TINY


def test_a_checkpoint_without_a_vae_has_no_vae_layout(tiny_checkpoint: Path) -> None:
    with open_checkpoint(tiny_checkpoint) as source:
        infos = {name: info for name, info in source.tensors.items() if not name.startswith("first_stage")}
        assert layout_of(infos, read_hints(source.metadata)) == replace(TINY, vae=None)


def test_the_vae_scale_comes_from_the_metadata(tiny_checkpoint: Path) -> None:
    with open_checkpoint(tiny_checkpoint) as source:
        layout = layout_of(source.tensors, provenance=Provenance(vae_scale=0.1406, vae_shift=-0.4743))
    assert layout.vae is not None
    assert (layout.vae.scale, layout.vae.shift) == (0.1406, -0.4743)


def test_unknown_heads_are_an_error(tiny_checkpoint: Path) -> None:
    with open_checkpoint(tiny_checkpoint) as source:
        foreign = MemorySource({name: source.load(name) for name in source.tensors}, {}, "tiny.safetensors")
    with pytest.raises(
        InputError, match="a width of 16 cannot be divided into heads of 64 channels"
    ) as caught:
        infer_layout(foreign)
    assert caught.value.hint == "set unet_heads in the metadata spectune.layout"


def test_the_number_of_heads_per_level_is_checked(tiny_checkpoint: Path) -> None:
    with open_checkpoint(tiny_checkpoint) as source, pytest.raises(InputError, match="expected 3 numbers"):
        layout_of(source.tensors, {"unet_heads": [1, 2]})


def test_uneven_levels_are_refused(full_infos: Mapping[str, TensorInfo]) -> None:
    cut = {name: info for name, info in full_infos.items() if "input_blocks.8.0.in_layers.2" not in name}
    with pytest.raises(InputError, match=r"its levels have \[2, 2, 1\] resnets"):
        layout_of(cut)


def test_uneven_depths_are_refused(full_infos: Mapping[str, TensorInfo]) -> None:
    cut = {n: info for n, info in full_infos.items() if "input_blocks.8.1.transformer_blocks.9" not in n}
    with pytest.raises(InputError, match=r"have different depths: \[9, 10\]"):
        layout_of(cut)


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(InputError, match="it has no tensors"):
        infer_layout(MemorySource({}, {}, "empty.safetensors"))
