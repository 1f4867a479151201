from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.provenance import HasProvenance
from spectune.files.source import MemorySource, TensorInfo
from spectune.sdxl.layout import Layout, TextLayout, UNetLayout, VaeLayout
from spectune.sdxl.names import diffusers_name, kohya_stem, module_path, modules_of
from spectune.sdxl.state_dicts import module_tensors, single_file_tensors
from tests.layouts import FULL, TINY, Modules, build_modules

PARTS = ("unet", "te1", "te2", "vae")


@pytest.fixture(scope="module")
def full_modules() -> Modules:
    with torch.device("meta"):
        return build_modules(FULL)


def test_kohya_stem() -> None:
    assert kohya_stem("unet.input_blocks.4.1.proj_in") == "lora_unet_input_blocks_4_1_proj_in"
    assert (
        kohya_stem("te2.text_model.encoder.layers.3.self_attn.q_proj")
        == "lora_te2_text_model_encoder_layers_3_self_attn_q_proj"
    )


@pytest.mark.parametrize(
    ("layer", "module"),
    [
        ("unet.input_blocks.0.0", "unet.conv_in"),
        ("unet.input_blocks.3.0.op", "unet.down_blocks.0.downsamplers.0.conv"),
        ("unet.input_blocks.4.0.skip_connection", "unet.down_blocks.1.resnets.0.conv_shortcut"),
        ("unet.input_blocks.8.1.transformer_blocks.9.ff.net.0.proj",
         "unet.down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj"),
        ("unet.middle_block.2.in_layers.2", "unet.mid_block.resnets.1.conv1"),
        ("unet.output_blocks.2.2.conv", "unet.up_blocks.0.upsamplers.0.conv"),
        ("unet.output_blocks.8.0.emb_layers.1", "unet.up_blocks.2.resnets.2.time_emb_proj"),
        ("te1.text_model.encoder.layers.0.mlp.fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
        ("te2.text_model.encoder.layers.3.self_attn.q_proj",
         "text_encoder_2.text_model.encoder.layers.3.self_attn.q_proj"),
    ],
)  # fmt: skip
def test_diffusers_module(layer: str, module: str) -> None:
    assert diffusers_name(layer, FULL.unet) == module


@pytest.mark.parametrize("part", PARTS)
def test_full_tables_cover_real_modules(
    part: str, full_modules: Modules, full_infos: Mapping[str, TensorInfo]
) -> None:
    source = Infos(full_infos)
    views = module_tensors(FULL, part, source)  # type: ignore[arg-type]
    state = full_modules.states()[part]
    assert views.keys() == state.keys()
    for key, view in views.items():
        stored = torch.empty(full_infos[view.tensor].shape, device="meta")
        assert view.read(stored).shape == state[key].shape, key


def test_full_single_file_has_the_known_names_and_shapes(
    full_modules: Modules, full_infos: Mapping[str, TensorInfo]
) -> None:
    tensors = full_modules.single_file()
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        n: i.shape for n, i in full_infos.items()
    }
    assert len(tensors) == 2515


def test_module_path_is_where_the_module_lives(tiny_modules: Modules, tiny_checkpoint: Path) -> None:
    for part in ("unet", "te1", "te2"):
        module = getattr(tiny_modules, part)
        for entry in modules_of(TINY, part):  # type: ignore[arg-type]
            assert module_path(entry.layer, TINY.unet) == (part, entry.path)
            assert module.get_submodule(entry.path).weight is not None


def test_round_trip_through_the_file(tiny_modules: Modules, tiny_checkpoint: Path) -> None:
    with open_checkpoint(tiny_checkpoint) as source:
        for part, state in tiny_modules.states().items():
            views = module_tensors(TINY, part, source)  # type: ignore[arg-type]
            assert views.keys() == state.keys()
            for key, view in views.items():
                assert torch.equal(view.load(source).float(), state[key]), key


def test_fused_rows_transposition_and_reversed_levels(tiny_modules: Modules) -> None:
    """Spelled out by hand, so that an error in the table and its inverse cannot cancel."""
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


def test_both_spellings_of_the_first_encoder(tiny_modules: Modules) -> None:
    states = tiny_modules.states()
    long_te1 = {f"text_model.{key}": tensor for key, tensor in states["te1"].items()}
    again = single_file_tensors(TINY, states["unet"], long_te1, states["te2"], states["vae"])
    assert all(torch.equal(again[name], tensor) for name, tensor in tiny_modules.single_file().items())
    short = {
        name.replace(".transformer.text_model.", ".transformer."): tensor for name, tensor in again.items()
    }
    views = module_tensors(TINY, "te1", MemorySource(short, {}))
    assert all(
        torch.equal(views[key].read(short[views[key].tensor]), state) for key, state in states["te1"].items()
    )


def test_missing_and_surplus_tensors_are_named(tiny_modules: Modules) -> None:
    tensors = tiny_modules.single_file()
    lost = "model.diffusion_model.out.2.bias"
    without = MemorySource({name: t for name, t in tensors.items() if name != lost}, {}, "small.safetensors")
    with pytest.raises(InputError, match=re.escape(f"tensors are missing in small.safetensors: {lost}")):
        module_tensors(TINY, "unet", without)
    extra = "model.diffusion_model.input_blocks.1.0.adapter.weight"
    surplus = MemorySource({**tensors, extra: torch.zeros(1)}, {}, "small.safetensors")
    with pytest.raises(
        InputError, match=re.escape(f"1 tensors of small.safetensors have no place in the unet: {extra}")
    ):
        module_tensors(TINY, "unet", surplus)


def test_what_sdxl_does_not_use_of_the_first_clip(tiny_modules: Modules) -> None:
    unused = {
        f"conditioner.embedders.0.{name}": torch.zeros(1)
        for name in ("transformer.text_projection.weight", "transformer.logit_scale", "logit_scale")
    }
    tensors = tiny_modules.single_file()
    source = MemorySource({**tensors, **unused}, {})
    assert module_tensors(TINY, "te1", source) == module_tensors(TINY, "te1", MemorySource(tensors, {}))


@settings(max_examples=20, deadline=None)
@given(
    channels=st.lists(st.sampled_from([8, 16]), min_size=1, max_size=4),
    depths=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    resnets=st.integers(1, 3),
    layers=st.integers(1, 3),
)
def test_tables_are_bijections(channels: list[int], depths: list[int], resnets: int, layers: int) -> None:
    layout = Layout(
        unet=UNetLayout(
            channels=tuple(channels), depths=tuple(depths[: len(channels)]), mid_depth=1, resnets=resnets,
            in_channels=4, out_channels=4, context=8, heads=(1,) * len(channels), time_id_channels=2,
            pooled=4, norm_groups=4,
        ),
        te1=TextLayout(4, layers, 1, 8, 10, 7, None, "quick_gelu"),
        te2=TextLayout(4, layers, 1, 8, 10, 7, 4, "gelu"),
        vae=VaeLayout(tuple(channels), resnets, 4, 4, 0.13025, 0.0),
    )  # fmt: skip
    modules = [module for part in PARTS for module in modules_of(layout, part)]  # type: ignore[arg-type]
    assert len({module.layer for module in modules}) == len(modules)
    assert len({kohya_stem(module.layer) for module in modules}) == len(modules)
    for part in PARTS:
        paths = [module.path for module in modules_of(layout, part)]  # type: ignore[arg-type]
        assert len(set(paths)) == len(paths)
    slots = [(view.tensor, view.rows) for module in modules for _, view in module.parameters]
    assert len(set(slots)) == len(slots)


class Infos(HasProvenance):
    """A source of names and shapes without numbers."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors
        self.metadata: Mapping[str, str] = {}
        self.label = "full.safetensors"

    def load(self, name: str) -> torch.Tensor:
        raise AssertionError(name)
