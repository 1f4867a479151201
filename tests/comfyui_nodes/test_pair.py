"""Test the node Load Residual + Principal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import spectune
from tests.comfyui_nodes.conftest import BASE
from tests.comfyui_nodes.fakes import Comfy, comfyui_state_dicts
from tests.comfyui_nodes.weights import worst
from tests.sample_pairs import changed_copy, saved_tuned, small_split, tuned_from

EPS = torch.finfo(torch.float32).eps
HALF = torch.finfo(torch.float16).eps / 2
RANK = 4


@pytest.fixture
def original(comfy: Comfy) -> dict[str, Tensor]:
    model, clip = comfyui_state_dicts(load_file(comfy.folders["checkpoints"] / BASE))
    return model | clip


def split_here(comfy: Comfy, residual_dtype: str = "float32", **changes: Any) -> tuple[str, str]:
    inputs: dict[str, Any] = {
        "residual_folder": "",
        "principal_folder": "",
        "layers": "default",
        "overwrite": False,
    }
    inputs |= {"checkpoint": BASE, "rank": RANK, "residual_dtype": residual_dtype, **changes}
    return comfy.run("SpectuneSplit", **inputs)


def load(
    comfy: Comfy, residual: str, principal: str, method: str = "patch", **more: str
) -> dict[str, Tensor]:
    model, clip, vae = comfy.run(
        "SpectuneLoadPair", residual=residual, principal=principal, method=method, **more
    )
    assert vae == "vae"
    return model.weights() | clip.patcher.weights()


def test_the_patched_residual_equals_the_original_up_to_float32_rounding(
    comfy: Comfy, original: dict[str, Tensor]
) -> None:
    pair = split_here(comfy)
    # the product is a sum of RANK terms, in ComfyUI's order; B A and R are about as large as W
    assert worst(load(comfy, *pair), original) < 4 * RANK * EPS


def test_a_16_bit_residual_has_the_error_of_its_rounding(comfy: Comfy, original: dict[str, Tensor]) -> None:
    error = worst(load(comfy, *split_here(comfy, "default")), original)
    assert 4 * RANK * EPS < error < 2 * HALF


def test_a_factor_off_by_1_percent_fails(
    comfy: Comfy, original: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = split_here(comfy)
    patching = comfy.nodes.nodes_pair.patched.__globals__
    adapter_of = patching["adapter_of"]

    def off(low_rank: Any) -> Any:
        patch = adapter_of(low_rank)
        up, down, alpha, *rest = patch.weights
        patch.weights = (up, down, alpha * 1.01, *rest)
        return patch

    monkeypatch.setitem(patching, "adapter_of", off)
    assert worst(load(comfy, *pair), original) > 1e-4


def test_the_residual_alone_is_not_the_original(comfy: Comfy, original: dict[str, Tensor]) -> None:
    residual, _ = split_here(comfy)
    model, clip = comfyui_state_dicts(load_file(comfy.folders["checkpoints"] / residual))
    assert worst(model | clip, original) > 0.1


def test_restore_gives_the_original_bit_for_bit(comfy: Comfy, original: dict[str, Tensor]) -> None:
    weights = load(comfy, *split_here(comfy), method="restore")
    assert weights.keys() == original.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in original.items())
    file = load_file(comfy.folders["checkpoints"] / BASE)
    (state,) = comfy.loaded_states
    assert state.keys() == file.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in file.items())


@pytest.mark.parametrize("method", ["patch", "restore"])
def test_a_wrong_pair_is_an_error_with_both_hashes(comfy: Comfy, method: str) -> None:
    residual, _ = split_here(comfy, "default")
    _, other = split_here(comfy, "default", rank=2, residual_folder="two", principal_folder="two")
    with pytest.raises(
        RuntimeError,
        match=r"belongs to principal [0-9a-f]{16}, .* is principal [0-9a-f]{16}\nhint: pass the two",
    ):
        load(comfy, residual, other, method)


def test_a_full_model_is_not_a_residual(comfy: Comfy) -> None:
    _, principal = split_here(comfy)
    with pytest.raises(RuntimeError, match="is not a residual of spectune"):
        load(comfy, BASE, principal)


def test_the_names_may_come_from_a_split_node(comfy: Comfy, original: dict[str, Tensor]) -> None:
    residual, principal = split_here(comfy)
    weights = load(comfy, "none", "none", residual_file=residual, principal_file=principal)
    assert worst(weights, original) < 4 * RANK * EPS


def test_a_missing_choice_is_an_error(comfy: Comfy) -> None:
    residual, _ = split_here(comfy)
    with pytest.raises(
        RuntimeError, match="principal is not set\nhint: choose a file, or connect principal_file"
    ):
        load(comfy, residual, "none")


def test_a_tuned_adapter_replaces_its_principal(comfy: Comfy, tmp_path: Path) -> None:
    base = comfy.folders["checkpoints"] / BASE
    report = small_split(base, tmp_path / "parts", rank=RANK, residual_dtype=torch.float32)
    assert report.residual is not None
    report.residual.rename(comfy.folders["checkpoints"] / "r.safetensors")
    tuned = saved_tuned(tuned_from(base, report, size=0.05), comfy.folders["loras"] / "t.safetensors")
    spectune.rebuild(tuned, base, tmp_path / "rebuilt.safetensors", dtype="float32")
    model, clip = comfyui_state_dicts(load_file(tmp_path / "rebuilt.safetensors"))
    assert worst(load(comfy, "r.safetensors", "t.safetensors"), model | clip) < 8 * RANK * EPS


def test_a_layer_without_a_weight_is_not_skipped(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = split_here(comfy)
    original_function = comfyui_state_dicts
    removed = "diffusion_model.middle_block.1.proj_in.weight"

    def lacking(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model, clip = original_function(tensors)
        return {name: weight for name, weight in model.items() if name != removed}, clip

    monkeypatch.setattr("tests.comfyui_nodes.fakes.comfyui_state_dicts", lacking)
    with pytest.raises(RuntimeError, match=rf"1 of \d+ layers have no weight in .*: {removed}\nhint"):
        load(comfy, *pair)


def test_changed_files_are_loaded_again(comfy: Comfy) -> None:
    residual, principal = split_here(comfy)
    node = comfy.nodes.NODE_CLASS_MAPPINGS["SpectuneLoadPair"]
    before = node.IS_CHANGED(residual=residual, principal=principal, method="patch")
    path = comfy.folders["loras"] / principal
    changed_copy(path, path, {"more": torch.zeros(8)})
    assert node.IS_CHANGED(residual=residual, principal=principal, method="patch") != before
    node.IS_CHANGED(residual=None, principal=None, method="patch")  # as ComfyUI calls it for linked inputs
