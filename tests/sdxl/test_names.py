from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectune.sdxl import names as names_module
from spectune.sdxl.layout import PARTS, Layout, TextLayout, UNetLayout, VaeLayout
from spectune.sdxl.names import comfyui_name, diffusers_name, kohya_stem, module_path, modules_of
from tests.layouts import FULL, TINY, Modules


def test_the_example_of_the_module_docstring() -> None:
    layer = "unet.input_blocks.4.1.proj_in"
    diffusers = diffusers_name(layer, FULL.unet)
    names = [
        f"{layer}`",
        f"{diffusers}`",
        f"{kohya_stem(layer)}.lora_down",
        f"{comfyui_name(layer)}.lora_down",
    ]
    for name in (*names, f"{kohya_stem(diffusers)}.lora_down"):
        assert f"`{name}" in (names_module.__doc__ or "")


def test_kohya_stem_replaces_dots() -> None:
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
def test_diffusers_names(layer: str, module: str) -> None:
    assert diffusers_name(layer, FULL.unet) == module


def test_module_path_leads_to_the_module_in_memory(tiny_modules: Modules, tiny_checkpoint: Path) -> None:
    for part in ("unet", "te1", "te2"):
        module = getattr(tiny_modules, part)
        for entry in modules_of(TINY, part):
            assert module_path(entry.layer, TINY.unet) == (part, entry.path)
            assert module.get_submodule(entry.path).weight is not None


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
    modules = [module for part in PARTS for module in modules_of(layout, part)]
    assert len({module.layer for module in modules}) == len(modules)
    assert len({kohya_stem(module.layer) for module in modules}) == len(modules)
    for part in PARTS:
        paths = [module.path for module in modules_of(layout, part)]
        assert len(set(paths)) == len(paths)
    slots = [(view.tensor, view.rows) for module in modules for _, view in module.parameters]
    assert len(set(slots)) == len(slots)
