from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.source import TensorInfo
from spectune.sdxl.layers import Kind, Layer, build_catalogue, layer_weight
from spectune.sdxl.names import Part


def test_the_full_layout_has_the_layers_of_preset_full(full_infos: Mapping[str, TensorInfo]) -> None:
    catalogue = build_catalogue(full_infos)
    assert len(catalogue) == 1052
    assert Counter(layer.part for layer in catalogue) == {Part.UNET: 788, Part.TE1: 72, Part.TE2: 192}
    assert Counter(layer.kind for layer in catalogue if layer.part is Part.UNET) == {
        Kind.LINEAR: 739,
        Kind.CONV: 49,
    }
    assert all(layer.default for layer in catalogue)
    assert round(sum(layer.out_features * layer.in_features for layer in catalogue) / 1e9, 3) == 3.273
    at_64 = sum(64 * (layer.out_features + layer.in_features) for layer in catalogue)
    assert round(at_64 / 1e6, 1) == 254.6


def test_adapter_names_of_the_full_layout_are_a_bijection(full_infos: Mapping[str, TensorInfo]) -> None:
    catalogue = build_catalogue(full_infos, all_layers=True)
    assert len(catalogue.by_kohya) == len(catalogue.by_name) == len(catalogue.layers) == 1052 + 6
    assert len({layer.diffusers for layer in catalogue}) == 1058
    assert all(catalogue.by_kohya[layer.kohya] is layer for layer in catalogue)


def test_extra_layers(full_infos: Mapping[str, TensorInfo]) -> None:
    extra = [layer.name for layer in build_catalogue(full_infos, all_layers=True) if not layer.default]
    assert extra == [
        "unet.time_embed.0",
        "unet.time_embed.2",
        "unet.label_emb.0.0",
        "unet.label_emb.0.2",
        "unet.input_blocks.0.0",
        "unet.out.2",
    ]


def test_diffusers_names_and_shapes(
    full_infos: Mapping[str, TensorInfo], diffusers_modules: Mapping[str, tuple[int, ...]]
) -> None:
    known = {
        _with_text_model(name): shape
        for name, shape in diffusers_modules.items()
        if not name.startswith("vae.")
    }
    ours = {layer.diffusers: layer.shape for layer in build_catalogue(full_infos, all_layers=True)}
    assert known.keys() - ours.keys() == {"text_encoder_2.text_projection"}
    assert ours == {name: known[name] for name in ours}


def _with_text_model(name: str) -> str:
    """Return a name as in files; the table has the first encoder's names in memory."""
    return re.sub(r"^text_encoder\.(?!text_model\.)", "text_encoder.text_model.", name)


def test_layer_records_of_the_full_layout(full_infos: Mapping[str, TensorInfo]) -> None:
    by_name = build_catalogue(full_infos).by_name
    assert by_name["unet.input_blocks.4.1.proj_in"] == Layer(
        name="unet.input_blocks.4.1.proj_in",
        part=Part.UNET,
        kind=Kind.LINEAR,
        shape=(640, 640),
        tensor="model.diffusion_model.input_blocks.4.1.proj_in.weight",
        rows=None,
        block="down.1",
        default=True,
        diffusers="unet.down_blocks.1.attentions.0.proj_in",
    )
    key = by_name["te2.text_model.encoder.layers.3.self_attn.k_proj"]
    assert (key.rows, key.shape, key.block) == ((1280, 2560), (1280, 1280), "te2.3")
    assert key.tensor == "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight"
    conv = by_name["unet.output_blocks.2.2.conv"]
    assert (conv.kind, conv.out_features, conv.in_features, conv.block) == (Kind.CONV, 1280, 11520, "up.0")
    assert by_name["unet.input_blocks.3.0.op"].block == "down.0"
    assert by_name["unet.middle_block.1.proj_in"].block == "mid"


def test_fused_tensors_have_three_layers(full_infos: Mapping[str, TensorInfo]) -> None:
    by_tensor = build_catalogue(full_infos).by_tensor
    assert Counter(len(layers) for layers in by_tensor.values()) == {1: 1052 - 96, 3: 32}
    fused = by_tensor["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"]
    assert [layer.rows for layer in fused] == [(0, 1280), (1280, 2560), (2560, 3840)]


def test_layer_weights_are_the_rows_of_their_tensors(tiny_checkpoint: Path) -> None:
    with open_checkpoint(tiny_checkpoint) as source:
        catalogue = build_catalogue(source)
        for layer in catalogue:
            assert layer_weight(source, layer).shape == layer.shape
        names = [f"te2.text_model.encoder.layers.0.self_attn.{axis}_proj" for axis in "qkv"]
        rows = [layer_weight(source, catalogue.by_name[name]) for name in names]
        assert torch.equal(torch.cat(rows), source.load(catalogue.by_name[names[0]].tensor))
        assert build_catalogue(source.tensors) == catalogue


def test_a_missing_tensor_is_named(full_infos: Mapping[str, TensorInfo]) -> None:
    lost = "model.diffusion_model.output_blocks.8.0.in_layers.2.weight"
    infos = {name: info for name, info in full_infos.items() if name != lost}
    with pytest.raises(
        InputError, match=re.escape(f"1 of 988 tensors are missing in the checkpoint: {lost}")
    ):
        build_catalogue(infos)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cond_stage_model.transformer.x", "but an SD 1 or 2 checkpoint"),
        ("lora_unet_x.lora_down.weight", "but an adapter"),
        ("something.else", "not an SDXL checkpoint: no"),
    ],
)
def test_other_files_are_recognized(name: str, kind: str) -> None:
    with pytest.raises(InputError, match=kind):
        build_catalogue({name: TensorInfo(name, torch.float16, (1,))})


TE2_QKV = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        (TE2_QKV, (3 * 1280 * 1280,), "expected 2 axes"),
        (TE2_QKV, (1280, 1280), "expected 3840 rows, 1280 each for q, k and v"),
        ("model.diffusion_model.middle_block.1.proj_in.weight", (1280, 1280, 1, 1), "expected 2 axes"),
        ("model.diffusion_model.middle_block.0.out_layers.3.weight", (1280, 1280), "expected 4 axes"),
        ("model.diffusion_model.output_blocks.0.0.skip_connection.weight", (0, 2560, 1, 1), "not empty"),
    ],
)
def test_a_layer_with_another_number_of_axes_is_refused(
    name: str, shape: tuple[int, ...], expected: str, full_infos: Mapping[str, TensorInfo]
) -> None:
    infos = {**full_infos, name: TensorInfo(name, torch.float16, shape)}
    with pytest.raises(InputError, match=re.escape(f"{name} of the checkpoint has shape {shape}")) as caught:
        build_catalogue(infos)
    assert expected in caught.value.what
    assert caught.value.what.count(name) == 1  # once, not for each of q, k and v
