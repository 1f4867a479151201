from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.provenance import HasProvenance
from spectune.files.source import MemorySource, TensorInfo
from spectune.sdxl.layout import PARTS, PartName
from spectune.sdxl.state_dicts import module_tensors, single_file_tensors
from tests.layouts import FULL, TINY, Modules, build_modules


@pytest.fixture(scope="module")
def full_modules() -> Modules:
    with torch.device("meta"):
        return build_modules(FULL)


@pytest.mark.parametrize("part", PARTS)
def test_the_full_tables_cover_the_modules_of_the_libraries(
    part: PartName, full_modules: Modules, full_infos: Mapping[str, TensorInfo]
) -> None:
    source = Infos(full_infos)
    views = module_tensors(FULL, part, source)
    state = full_modules.states()[part]
    assert views.keys() == state.keys()
    for key, view in views.items():
        stored = torch.empty(full_infos[view.tensor].shape, device="meta")
        assert view.read(stored).shape == state[key].shape, key


def test_the_full_single_file_has_the_known_names_and_shapes(
    full_modules: Modules, full_infos: Mapping[str, TensorInfo]
) -> None:
    tensors = full_modules.single_file()
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        n: i.shape for n, i in full_infos.items()
    }
    assert len(tensors) == 2515


def test_state_dicts_round_trip_through_the_file(tiny_modules: Modules, tiny_checkpoint: Path) -> None:
    with open_checkpoint(tiny_checkpoint) as source:
        for part, state in tiny_modules.states().items():
            views = module_tensors(TINY, part, source)
            assert views.keys() == state.keys()
            for key, view in views.items():
                assert torch.equal(view.load(source).float(), state[key]), key


def test_fused_rows_transposition_and_reversed_levels(tiny_modules: Modules) -> None:
    """Compare with names written by hand, so that an error in the table and its inverse cannot cancel out."""
    tensors, states = tiny_modules.single_file(), tiny_modules.states()
    te2 = "conditioner.embedders.1.model."
    fused = tensors[f"{te2}transformer.resblocks.1.attn.in_proj_weight"]
    assert fused.shape == (72, 24)
    for index, axis in enumerate("qkv"):
        row_block = states["te2"][f"text_model.encoder.layers.1.self_attn.{axis}_proj.weight"]
        assert torch.equal(fused[24 * index : 24 * (index + 1)], row_block)
    assert torch.equal(tensors[f"{te2}text_projection"], states["te2"]["text_projection.weight"].T)
    assert tensors[f"{te2}logit_scale"].item() == pytest.approx(4.6051702)
    positions = tensors["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"]
    assert torch.equal(positions, torch.arange(77)[None])
    vae = "first_stage_model."
    attention = tensors[f"{vae}decoder.mid.attn_1.q.weight"]
    assert attention.shape == (16, 16, 1, 1)
    assert torch.equal(attention[:, :, 0, 0], states["vae"]["decoder.mid_block.attentions.0.to_q.weight"])
    top = tensors[f"{vae}decoder.up.2.block.0.conv1.weight"]
    assert torch.equal(top, states["vae"]["decoder.up_blocks.0.resnets.0.conv1.weight"])
    assert all(tensor.is_contiguous() for tensor in tensors.values())


def test_both_spellings_of_the_first_encoder_in_memory(tiny_modules: Modules) -> None:
    states = tiny_modules.states()
    long_te1 = {f"text_model.{key}": tensor for key, tensor in states["te1"].items()}
    again = single_file_tensors(TINY, states["unet"], long_te1, states["te2"], states["vae"])
    assert all(torch.equal(again[name], tensor) for name, tensor in tiny_modules.single_file().items())


def test_missing_and_surplus_tensors_are_named(tiny_modules: Modules) -> None:
    tensors = tiny_modules.single_file()
    lost = "model.diffusion_model.out.2.bias"
    without = MemorySource({name: t for name, t in tensors.items() if name != lost}, {}, "small.safetensors")
    with pytest.raises(InputError, match=re.escape(f"tensors are missing in small.safetensors: {lost}")):
        module_tensors(TINY, "unet", without)
    extra = "model.diffusion_model.input_blocks.1.0.adapter.weight"
    surplus = MemorySource({**tensors, extra: torch.zeros(1)}, {}, "small.safetensors")
    with pytest.raises(
        InputError,
        match=re.escape(f"small.safetensors has 1 tensor without a counterpart in the unet: {extra}"),
    ):
        module_tensors(TINY, "unet", surplus)


def test_unused_tensors_of_the_first_clip_are_ignored(tiny_modules: Modules) -> None:
    unused = {
        f"conditioner.embedders.0.{name}": torch.zeros(1)
        for name in ("transformer.text_projection.weight", "transformer.logit_scale", "logit_scale")
    }
    tensors = tiny_modules.single_file()
    source = MemorySource({**tensors, **unused}, {})
    assert module_tensors(TINY, "te1", source) == module_tensors(TINY, "te1", MemorySource(tensors, {}))


class Infos(HasProvenance):
    """A source of names and shapes without values."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors
        self.metadata: Mapping[str, str] = {}
        self.label = "full.safetensors"

    def load(self, name: str) -> torch.Tensor:
        raise AssertionError(name)
