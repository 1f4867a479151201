"""Test the node Apply Tuned Deltas."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import spectune
from spectune.files.provenance import Provenance
from tests.comfyui_nodes.conftest import BASE
from tests.comfyui_nodes.fakes import (
    CONST,
    Comfy,
    ModelSamplingDiscreteFlow,
    SampledV,
    comfyui_state_dicts,
    loaded,
)
from tests.comfyui_nodes.weights import worst
from tests.sample_pairs import read_metadata, small_split

EPS = torch.finfo(torch.float32).eps
RANK = 4
NAME = "tuned.safetensors"


@pytest.fixture
def tuned(comfy: Comfy, tuned_file: Path) -> Path:
    return Path(shutil.copy(tuned_file, comfy.folders["loras"] / NAME))


def base_model(comfy: Comfy) -> tuple[Any, Any]:
    model, clip, _, _ = loaded(load_file(comfy.folders["checkpoints"] / BASE))
    return model, clip


def apply(comfy: Comfy, *, strengths: tuple[float, float] = (1.0, 1.0), **more: Any) -> dict[str, Tensor]:
    model, clip = more.pop("onto", None) or base_model(comfy)
    inputs = {"adapter": NAME, "strength_model": strengths[0], "strength_clip": strengths[1], **more}
    model, clip = comfy.run("SpectuneApplyDeltas", model=model, clip=clip, **inputs)
    return model.weights() | clip.patcher.weights()


def rebuilt(comfy: Comfy, tmp_path: Path, strength: Any = 1.0) -> dict[str, Tensor]:
    out = tmp_path / "rebuilt.safetensors"
    base = comfy.folders["checkpoints"] / BASE
    spectune.rebuild(comfy.folders["loras"] / NAME, base, out, strength=strength, dtype="float32", force=True)
    model, clip = comfyui_state_dicts(load_file(out))
    return model | clip


def with_metadata(path: Path, **changes: Any) -> None:
    metadata = read_metadata(path)
    changed = replace(Provenance.from_metadata(metadata), **changes).to_metadata()
    kept = {key: text for key, text in metadata.items() if key.removeprefix("spectune.") not in changes}
    save_file(load_file(path), path, metadata=kept | changed)


@pytest.mark.usefixtures("tuned")
def test_the_patched_model_equals_the_rebuilt_model(comfy: Comfy, tmp_path: Path) -> None:
    expected = rebuilt(comfy, tmp_path)
    assert worst(apply(comfy), expected) < 4 * RANK * EPS
    model, clip = base_model(comfy)
    assert worst(model.weights() | clip.patcher.weights(), expected) > 1e-3, "the adapter changes nothing"


@pytest.mark.usefixtures("tuned")
def test_a_strength_off_by_1_percent_fails(comfy: Comfy, tmp_path: Path) -> None:
    assert worst(apply(comfy, strengths=(1.01, 1.0)), rebuilt(comfy, tmp_path)) > 1e-5
    assert worst(apply(comfy, strengths=(1.0, 1.01)), rebuilt(comfy, tmp_path)) > 1e-5


@pytest.mark.usefixtures("tuned")
def test_model_and_clip_have_separate_strengths(comfy: Comfy, tmp_path: Path) -> None:
    expected = rebuilt(comfy, tmp_path, {"unet": 0.5, "te": 0.25})
    assert worst(apply(comfy, strengths=(0.5, 0.25)), expected) < 4 * RANK * EPS


def test_an_adapter_that_replaces_tensors_of_the_base_is_refused(comfy: Comfy, tuned: Path) -> None:
    replaced = {"replaced.model.diffusion_model.time_embed.0.bias": torch.zeros(4)}
    save_file(load_file(tuned) | replaced, tuned, metadata=read_metadata(tuned))
    with pytest.raises(Exception, match="replaces 1 tensor of its base") as caught:
        apply(comfy)
    assert "rebuild the checkpoint with `spectune rebuild`" in str(caught.value)


@pytest.mark.usefixtures("tuned")
def test_inputs_are_not_changed(comfy: Comfy) -> None:
    model, clip = base_model(comfy)
    apply(comfy, onto=(model, clip))
    assert (model.patches, clip.patcher.patches) == ({}, {})


@pytest.mark.usefixtures("tuned")
def test_patch_keys_are_the_names_of_comfyui(comfy: Comfy) -> None:
    key = comfy.nodes.nodes_deltas.catalogue_of.__globals__["patch_key"]
    middle = "middle_block.1.transformer_blocks.0.attn1.to_q"
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    assert key(f"unet.{middle}") == f"diffusion_model.{middle}.weight"
    assert key(f"te1.{layer}") == f"clip_l.transformer.{layer}.weight"
    assert key(f"te2.{layer}") == f"clip_g.transformer.{layer}.weight"


@pytest.mark.usefixtures("tuned")
def test_the_catalogue_of_a_loaded_model_equals_that_of_its_file(comfy: Comfy) -> None:
    from spectune.checkpoints.open import open_checkpoint
    from spectune.sdxl.layers import build_catalogue

    with open_checkpoint(comfy.folders["checkpoints"] / BASE) as source:
        expected = build_catalogue(source, all_layers=True)
    assert comfy.nodes.nodes_deltas.catalogue_of(*base_model(comfy)) == expected


def test_layers_of_other_shapes_are_refused(comfy: Comfy, tuned: Path) -> None:
    tensors = load_file(tuned)
    key = next(key for key in tensors if key.endswith("attn1_to_q.delta_down.weight"))
    wide = {name: torch.zeros(4, 99) for name in (key, key.replace("delta_", "frame_"))}
    save_file(tensors | wide, tuned, metadata=read_metadata(tuned))
    with pytest.raises(
        RuntimeError, match=r"does not fit the layer .*: expected \(4, \d+\), got \(4, 99\)\nhint"
    ):
        apply(comfy)


def test_unknown_layers_are_refused(comfy: Comfy, tuned: Path) -> None:
    tensors = load_file(tuned)
    stem = next(key for key in tensors if "attn1_to_q" in key).partition(".")[0]
    renamed = {key.replace(stem, "lora_unet_input_blocks_99_1_proj_in"): t for key, t in tensors.items()}
    save_file(renamed, tuned, metadata=read_metadata(tuned))
    with pytest.raises(
        RuntimeError, match=r"1 of .* have no counterpart in the model: lora_unet_input_blocks_99"
    ):
        apply(comfy)


def test_another_architecture_is_refused(comfy: Comfy, tuned: Path) -> None:
    model, clip, _, _ = loaded({"model.diffusion_model.double_blocks.0.weight": torch.zeros(2, 2)})
    with pytest.raises(RuntimeError, match="the connected MODEL and CLIP is not an SDXL"):
        apply(comfy, onto=(model, clip))


def test_a_selected_base_is_checked(comfy: Comfy, tuned: Path) -> None:
    apply(comfy, checkpoint=BASE)
    other = comfy.folders["checkpoints"] / "other.safetensors"
    tensors = load_file(comfy.folders["checkpoints"] / BASE)
    first = next(iter(tensors))
    save_file(
        tensors | {first: tensors[first] + 1},
        other,
        metadata=read_metadata(comfy.folders["checkpoints"] / BASE),
    )
    apply(comfy)
    with pytest.raises(
        RuntimeError, match=r"was trained from base [0-9a-f]{16}, other.safetensors is [0-9a-f]{16}"
    ):
        apply(comfy, checkpoint="other.safetensors")
    with_metadata(tuned, base_hash=None)
    with pytest.raises(
        RuntimeError, match="does not declare the model it was trained from\nhint: set checkpoint"
    ):
        apply(comfy, checkpoint=BASE)


def test_a_base_is_hashed_only_once(comfy: Comfy, tuned: Path) -> None:
    apply(comfy, checkpoint=BASE)
    steps = comfy.steps
    assert steps > 100, "each tensor is an interrupt point"
    apply(comfy, checkpoint=BASE)
    assert comfy.steps == steps


def test_plain_loras_and_principals_are_refused(comfy: Comfy, tmp_path: Path) -> None:
    report = small_split(comfy.folders["checkpoints"] / BASE, tmp_path / "parts")
    shutil.copy(report.principal, comfy.folders["loras"] / NAME)
    with pytest.raises(
        RuntimeError, match=r"is not a tuned adapter[\s\S]*hint: load a plain LoRA with Load LoRA"
    ):
        apply(comfy)


def flow_sampled(comfy: Comfy) -> tuple[Any, Any]:
    class Flow(ModelSamplingDiscreteFlow, CONST): ...

    model, clip = base_model(comfy)
    model.add_object_patch("model_sampling", Flow())
    return model, clip


@pytest.mark.usefixtures("tuned")
def test_a_flow_adapter_warns_if_the_model_is_sampled_as_eps(
    comfy: Comfy, caplog: pytest.LogCaptureFixture
) -> None:
    apply(comfy, onto=flow_sampled(comfy))
    assert caplog.text == ""
    apply(comfy)
    assert (
        "was trained to predict flow, but the MODEL is sampled as eps; connect Flow Sampling" in caplog.text
    )


def test_a_model_set_to_another_prediction_is_refused(comfy: Comfy, tuned: Path) -> None:
    model, clip = base_model(comfy)
    model.add_object_patch("model_sampling", SampledV())
    with pytest.raises(
        RuntimeError, match=r"trained to predict flow, but the MODEL is sampled as v\nhint: use Flow"
    ):
        apply(comfy, onto=(model, clip))
    with_metadata(tuned, prediction="eps", flow_shift=None)
    with pytest.raises(RuntimeError, match="trained to predict eps, but the MODEL is sampled as flow"):
        apply(comfy, onto=flow_sampled(comfy))
    apply(comfy)
