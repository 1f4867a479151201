from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lycoris.functional.locon import diff_weight, weight_gen
from lycoris.modules.locon import LoConModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectune.adapters.adapter import Adapter, TunedAdapter
from spectune.adapters.reader import open_adapter
from spectune.adapters.writer import AdapterHeader, AdapterWriter, adapter_infos, kohya_metadata, save_tuned
from spectune.checkpoints.open import open_checkpoint
from spectune.core.delta import Delta
from spectune.core.low_rank import LowRank
from spectune.errors import InputError
from spectune.files.provenance import Provenance, Role
from spectune.files.source import TensorInfo
from spectune.files.weights_hash import weights_hash
from spectune.files.writer import StreamWriter
from spectune.sdxl.layers import Catalogue, Kind, Layer, build_catalogue

PROVENANCE = Provenance(role=Role.PRINCIPAL, version="0", base_hash="ab" * 32, prediction="eps")


@pytest.fixture(scope="module")
def catalogue(tiny_checkpoint: Path) -> Catalogue:
    with open_checkpoint(tiny_checkpoint) as source:
        return build_catalogue(source)


def low_rank(layer: Layer, rank: int, dtype: torch.dtype = torch.float16) -> LowRank:
    down, up = layer.factor_shapes(rank)
    return LowRank(torch.randn(down).to(dtype), torch.randn(up).to(dtype), alpha=float(rank))


@pytest.fixture
def adapter(catalogue: Catalogue) -> Adapter:
    return Adapter({layer.name: low_rank(layer, 4) for layer in catalogue}, {}, "memory")


def same(one: LowRank, other: LowRank) -> bool:
    return torch.equal(one.down, other.down) and torch.equal(one.up, other.up) and one.alpha == other.alpha


def save(path: Path, adapter: Adapter, catalogue: Catalogue) -> str:
    layers = [catalogue.by_name[name] for name in adapter.layers]
    ranks = {layer.name: adapter.layers[layer.name].rank for layer in layers}
    with AdapterWriter(path, AdapterHeader(layers, ranks, torch.float16, PROVENANCE)) as writer:
        for layer in layers:
            writer.write_layer(layer, adapter.layers[layer.name])
    return writer.hash


def saved(path: Path, adapter: Adapter, catalogue: Catalogue) -> dict[str, Tensor]:
    save(path, adapter, catalogue)
    return load_file(path)


def message(path: Path, tensors: Mapping[str, Tensor], catalogue: Catalogue) -> InputError:
    save_file(dict(tensors), path)
    with pytest.raises(InputError) as caught:
        open_adapter(path, catalogue)
    return caught.value


def test_round_trip(adapter: Adapter, catalogue: Catalogue, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written = save(path, adapter, catalogue)
    again = open_adapter(path, catalogue)
    assert isinstance(again, Adapter)
    assert list(again.layers) == list(adapter.layers)
    assert all(same(again.layers[name], adapter.layers[name]) for name in adapter.layers)
    assert again.provenance == PROVENANCE
    assert (again.label, again.warnings) == ("a.safetensors", ())
    with open_checkpoint(path) as source:
        assert weights_hash(source) == written


def test_the_layers_are_a_mapping(adapter: Adapter, catalogue: Catalogue, tmp_path: Path) -> None:
    names = list(adapter.layers)[:3]
    some = replace(adapter, layers={name: adapter.layers[name] for name in names})
    saved(tmp_path / "a.safetensors", some, catalogue)
    again = open_adapter(tmp_path / "a.safetensors", catalogue)
    assert len(again.layers) == 3
    assert names[0] in again.layers
    with pytest.raises(KeyError):
        again.layers[list(adapter.layers)[5]]


def test_keys_and_shapes_are_those_of_kohya(adapter: Adapter, catalogue: Catalogue, tmp_path: Path) -> None:
    tensors = saved(tmp_path / "a.safetensors", adapter, catalogue)
    assert len(tensors) == 3 * len(catalogue)
    linear = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"
    assert tensors[f"{linear}.lora_down.weight"].shape == (4, 24)
    assert tensors[f"{linear}.lora_up.weight"].shape == (24, 4)
    assert tensors[f"{linear}.alpha"].shape == ()
    assert (tensors[f"{linear}.alpha"].dtype, tensors[f"{linear}.alpha"].item()) == (torch.float32, 4)
    conv = "lora_unet_input_blocks_2_0_op"
    assert tensors[f"{conv}.lora_down.weight"].shape == (4, 16, 3, 3)
    assert tensors[f"{conv}.lora_up.weight"].shape == (16, 4, 1, 1)
    shortcut = "lora_unet_output_blocks_0_0_skip_connection"
    assert tensors[f"{shortcut}.lora_down.weight"].shape == (4, 64, 1, 1)


def test_lycoris_computes_the_same_product(adapter: Adapter, catalogue: Catalogue, tmp_path: Path) -> None:
    tensors = saved(tmp_path / "a.safetensors", adapter, catalogue)
    for layer in catalogue:
        down, up, alpha = (
            tensors[f"{layer.kohya}.{suffix}"] for suffix in ("lora_down.weight", "lora_up.weight", "alpha")
        )
        original = _module(layer)
        theirs = LoConModule.make_module_from_state_dict(layer.kohya, original, up, down, None, alpha, None)
        diff = theirs.get_diff_weight(shape=layer.shape)[0]
        ours = adapter.layers[layer.name]
        product = ours.scale * (ours.up.flatten(1).float() @ ours.down.flatten(1).float())
        torch.testing.assert_close(diff.flatten(1), product, rtol=1e-5, atol=1e-5)


def _module(layer: Layer) -> nn.Module:
    if layer.kind is Kind.LINEAR:
        return nn.Linear(layer.shape[1], layer.shape[0])
    return nn.Conv2d(layer.shape[1], layer.shape[0], layer.shape[2:], padding=layer.shape[2] // 2)


def test_full_size_files_have_the_known_size(full_infos: Mapping[str, TensorInfo]) -> None:
    catalogue = build_catalogue(full_infos)
    infos = adapter_infos(catalogue.layers, dict.fromkeys(catalogue.by_name, 64), torch.bfloat16)
    assert len(infos) == 3 * 1052
    assert round(sum(info.numel for info in infos if not info.name.endswith("alpha")) / 1e6, 1) == 254.6


def test_metadata_for_other_programs(adapter: Adapter, catalogue: Catalogue, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    saved(path, adapter, catalogue)
    with open_checkpoint(path) as source:
        metadata = dict(source.metadata)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "4")
    assert json.loads(metadata["ss_network_args"]) == {
        "conv_dim": "4",
        "conv_alpha": "4",
        "algo": "locon",
        "preset": "full",
        "train_norm": "False",
    }
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert metadata["modelspec.title"] == "style"


def test_ranks_in_the_metadata(catalogue: Catalogue) -> None:
    def dims(ranks: Mapping[str, int]) -> tuple[str, str]:
        entries = kohya_metadata(catalogue.layers, ranks, PROVENANCE, title="x")
        return entries["ss_network_dim"], json.loads(entries["ss_network_args"])["conv_dim"]

    capped = {layer.name: min(64, layer.full_rank) for layer in catalogue}
    spatial = {layer.name for layer in catalogue if layer.shape[2:] == (3, 3)}
    assert dims(capped) == (str(max(rank for name, rank in capped.items() if name not in spatial)), "32")
    assert dims({name: 8 if name in spatial else 4 for name in capped}) == ("4", "8")
    assert dims({name: 4 + (index == 0) for index, name in enumerate(capped)})[1] == "Dynamic"


def test_the_writer_leaves_nothing_after_a_crash(catalogue: Catalogue, tmp_path: Path) -> None:
    ranks = dict.fromkeys(catalogue.by_name, 2)
    with (
        pytest.raises(AssertionError, match=r"expected torch\.float16"),
        AdapterWriter(
            tmp_path / "a.safetensors",
            AdapterHeader(catalogue.layers, ranks, torch.float16, PROVENANCE),
        ) as writer,
    ):
        writer.write_layer(catalogue.layers[0], low_rank(catalogue.layers[0], 2, torch.float32))
    assert list(tmp_path.iterdir()) == []


def test_tuned_round_trip(catalogue: Catalogue, tmp_path: Path) -> None:
    layers: dict[str, Delta] = {}
    for layer in catalogue.layers[::7]:
        trained = low_rank(layer, 3, torch.float32)
        layers[layer.name] = Delta(low_rank(layer, 3), trained.down, trained.up)
    path = tmp_path / "t.safetensors"
    tuned = TunedAdapter(layers, {}, "memory")
    written = save_tuned(path, tuned, PROVENANCE, metadata={"spectune.steps": "10"})
    again = open_adapter(path, catalogue)
    assert isinstance(again, TunedAdapter)
    assert again.layers.keys() == layers.keys()
    for name, delta in layers.items():
        assert same(again.layers[name].frame, delta.frame)
        assert again.layers[name].frame.down.dtype == torch.float16
        assert torch.equal(again.layers[name].down, delta.down)
        assert torch.equal(again.layers[name].up, delta.up)
    assert again.provenance.role is Role.TUNED
    assert again.metadata["spectune.steps"] == "10"
    assert not any(key.startswith("ss_") for key in again.metadata)
    with open_checkpoint(path) as source:
        assert weights_hash(source) == written
        assert not any("lora_down" in key for key in source.tensors)


def test_layers_that_the_model_lacks_are_named(
    adapter: Adapter, catalogue: Catalogue, tmp_path: Path
) -> None:
    tensors = saved(tmp_path / "a.safetensors", adapter, catalogue)
    for n in range(5):
        tensors[f"lora_unet_input_blocks_9{n}_1_proj_in.alpha"] = torch.tensor(1.0)
    error = message(tmp_path / "b.safetensors", tensors, catalogue)
    assert error.what == (
        f"5 of {len(catalogue) + 5} layers of b.safetensors have no counterpart in the model: "
        "lora_unet_input_blocks_90_1_proj_in, lora_unet_input_blocks_91_1_proj_in, "
        "lora_unet_input_blocks_92_1_proj_in (2 more)"
    )


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "the adapter is for Flux"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "the adapter is for SD 1 or 2"),
        ("transformer.blocks.0.attn.to_q.lora_A.weight", "a transformer model such as Flux or SD 3"),
        ("something.weight", "expected an adapter for SDXL with kohya, PEFT or ComfyUI keys"),
    ],
)
def test_adapters_for_other_models_are_recognized(
    key: str, hint: str, catalogue: Catalogue, tmp_path: Path
) -> None:
    error = message(tmp_path / "b.safetensors", {key: torch.zeros(1, 1)}, catalogue)
    assert "1 of 1 layers of b.safetensors have no counterpart" in error.what
    assert error.hint is not None
    assert hint in error.hint


@pytest.mark.parametrize(
    ("suffix", "way"),
    [
        ("dora_scale", "write it as a plain LoRA first: `spectune export MODEL FILE`"),
        ("hada_w1_a", "write it as a plain LoRA first: `spectune export MODEL FILE`"),
        ("diff_b", "`spectune convert --drop PATTERN` removes keys"),
    ],
)
def test_other_kinds_of_adapter(
    suffix: str, way: str, adapter: Adapter, catalogue: Catalogue, tmp_path: Path
) -> None:
    stem = catalogue.layers[0].kohya
    tensors = saved(tmp_path / "a.safetensors", adapter, catalogue) | {f"{stem}.{suffix}": torch.zeros(1)}
    error = message(tmp_path / "b.safetensors", tensors, catalogue)
    assert error.what.startswith(
        f"b.safetensors has 1 key other than factors: {stem}.{suffix}; expected lora_down"
    )
    assert error.hint is not None
    assert error.hint.endswith(way)
    assert ("--drop" in error.hint) == (suffix == "diff_b")  # a drop would give another adapter


@pytest.mark.parametrize("has_base", [True, False])
def test_the_tucker_form_is_joined_to_two_factors(
    has_base: bool, catalogue: Catalogue, tmp_path: Path
) -> None:
    layer = catalogue.by_name["unet.middle_block.0.in_layers.2"]
    down, up, mid = weight_gen(torch.empty(layer.shape), 4)
    torch.nn.init.normal_(up)
    tensors = {
        "lora_down.weight": down,
        "lora_up.weight": up,
        "lora_mid.weight": mid,
        "alpha": torch.tensor(2.0),
    }
    save_file({f"{layer.kohya}.{suffix}": t for suffix, t in tensors.items()}, tmp_path / "a.safetensors")
    with open_adapter(tmp_path / "a.safetensors", catalogue if has_base else None) as opened:
        one = opened.layers[layer.name]
        assert isinstance(one, LowRank)
        assert (one.rank, one.alpha, opened.dtype(layer.name)) == (4, 2.0, torch.float32)
        expected = diff_weight(down, up, mid, gamma=2.0 / 4)
        actual = (one.up.flatten(1) @ one.down.flatten(1) * one.scale).reshape(layer.shape)
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_rank_zero_is_named(catalogue: Catalogue, tmp_path: Path) -> None:
    layer = catalogue.layers[0]
    n_out, n_in = layer.out_features, layer.in_features
    tensors = {
        f"{layer.kohya}.lora_down.weight": torch.empty(0, n_in),
        f"{layer.kohya}.lora_up.weight": torch.empty(n_out, 0),
    }
    error = message(tmp_path / "b.safetensors", tensors, catalogue)
    assert error.what == f"{layer.name} of b.safetensors has rank 0: it changes nothing"


def test_half_a_pair(adapter: Adapter, catalogue: Catalogue, tmp_path: Path) -> None:
    layer = catalogue.layers[0]
    tensors = saved(tmp_path / "a.safetensors", adapter, catalogue)
    del tensors[f"{layer.kohya}.lora_up.weight"]
    error = message(tmp_path / "b.safetensors", tensors, catalogue)
    assert error.what == f"{layer.name} of b.safetensors has no `lora_up.weight`"


@pytest.mark.parametrize("suffix", ["lora_down.weight", "lora_up.weight"])
def test_shapes_of_another_model_are_refused(
    suffix: str, adapter: Adapter, catalogue: Catalogue, tmp_path: Path
) -> None:
    layer = catalogue.by_name["unet.middle_block.1.proj_in"]
    key = f"{layer.kohya}.{suffix}"
    expected = {"lora_down.weight": (4, 32), "lora_up.weight": (32, 4)}[suffix]
    tensors = saved(tmp_path / "a.safetensors", adapter, catalogue) | {key: torch.zeros(4, 33)}
    error = message(tmp_path / "b.safetensors", tensors, catalogue)
    assert error.what == (
        f"{key} of b.safetensors does not fit the layer {layer.name} (32, 32): "
        f"expected {expected}, got (4, 33)"
    )


def test_a_missing_alpha_means_scale_1_with_a_warning(
    adapter: Adapter, catalogue: Catalogue, tmp_path: Path
) -> None:
    tensors = saved(tmp_path / "a.safetensors", adapter, catalogue)
    bare = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    save_file(bare, tmp_path / "b.safetensors")
    again = open_adapter(tmp_path / "b.safetensors", catalogue)
    assert isinstance(again, Adapter)
    assert all(again.layers[name].scale == 1 for name in again.layers)
    assert re.match(
        f"{len(catalogue)} layers of b.safetensors without alpha, read as scale 1: unet", again.warnings[0]
    )


def test_scale_is_alpha_over_rank(catalogue: Catalogue) -> None:
    one = low_rank(catalogue.layers[0], 4)
    assert (one.rank, one.scale, replace(one, alpha=2.0).scale) == (4, 1.0, 0.5)


def test_an_alpha_with_one_axis_is_read(adapter: Adapter, catalogue: Catalogue, tmp_path: Path) -> None:
    """Some programs write alpha as a tensor of one element."""
    tensors = saved(tmp_path / "a.safetensors", adapter, catalogue)
    for key in [key for key in tensors if key.endswith(".alpha")]:
        tensors[key] = torch.tensor([2.0])
    save_file(tensors, tmp_path / "b.safetensors")
    again = open_adapter(tmp_path / "b.safetensors", catalogue)
    assert isinstance(again, Adapter)
    assert {again.layers[name].alpha for name in again.layers} == {2.0}


def test_an_empty_file_is_refused(catalogue: Catalogue, tmp_path: Path) -> None:
    error = message(tmp_path / "b.safetensors", {}, catalogue)
    assert error.what == "b.safetensors has no tensors: expected an adapter"


def test_leaving_an_adapter_closes_its_file(adapter: Adapter, catalogue: Catalogue, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(path, adapter, catalogue)
    with open_adapter(path, catalogue) as opened:
        name = next(iter(opened.layers))
        assert opened.layers[name] is not None
    with pytest.raises(ValueError, match="closed file"):
        opened.layers[name]


def test_a_hash_that_fails_leaves_no_partial_file(
    adapter: Adapter, catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: StreamWriter) -> str:
        raise OSError("read error")

    monkeypatch.setattr(StreamWriter, "payload_sha256", fail)
    with pytest.raises(OSError, match="read error"):
        save(tmp_path / "a.safetensors", adapter, catalogue)
    assert list(tmp_path.iterdir()) == []
