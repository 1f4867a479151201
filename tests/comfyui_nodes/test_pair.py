from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import spectune
from tests.comfyui_nodes.conftest import BASE
from tests.comfyui_nodes.fakes import Comfy, as_comfyui_has_it
from tests.comfyui_nodes.weights import worst
from tests.sample_pairs import changed_copy, saved_tuned, small_split, tuned_from

EPS = torch.finfo(torch.float32).eps
HALF = torch.finfo(torch.float16).eps / 2
RANK = 4


@pytest.fixture
def original(comfy: Comfy) -> dict[str, Tensor]:
    model, clip = as_comfyui_has_it(load_file(comfy.folders["checkpoints"] / BASE))
    return model | clip


def split_here(comfy: Comfy, residual_type: str = "float32", **changes: Any) -> tuple[str, str]:
    inputs = {"residual_folder": "", "principal_folder": "", "layers": "default", "overwrite": False}
    told = {"checkpoint": BASE, "rank": RANK, "residual_type": residual_type, **inputs, **changes}
    return comfy.run("SpectuneSplit", **told)


def load(
    comfy: Comfy, residual: str, principal: str, method: str = "patch", **more: str
) -> dict[str, Tensor]:
    told = {"residual": residual, "principal": principal, "method": method, **more}
    model, clip, vae = comfy.run("SpectuneLoadPair", **told)
    assert vae == "vae"
    return model.weights() | clip.patcher.weights()


def test_the_patched_residual_is_the_original_within_float32_rounding(
    comfy: Comfy, original: dict[str, Tensor]
) -> None:
    pair = split_here(comfy)
    # the product is a sum of RANK terms, whose order is ComfyUI's; B A and R are as large as W, roughly
    assert worst(load(comfy, *pair), original) < 4 * RANK * EPS


def test_a_residual_of_16_bits_is_off_by_its_own_rounding(comfy: Comfy, original: dict[str, Tensor]) -> None:
    found = worst(load(comfy, *split_here(comfy, "model's own")), original)
    assert 4 * RANK * EPS < found < 2 * HALF


def test_a_factor_that_is_off_by_a_percent_is_noticed(
    comfy: Comfy, original: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = split_here(comfy)
    patching = comfy.nodes.nodes_pair.patched.__globals__
    made = patching["adapter_of"]

    def off(low_rank: Any) -> Any:
        patch = made(low_rank)
        up, down, alpha, *rest = patch.weights
        patch.weights = (up, down, alpha * 1.01, *rest)
        return patch

    monkeypatch.setitem(patching, "adapter_of", off)
    assert worst(load(comfy, *pair), original) > 1e-4


def test_the_residual_alone_is_not_the_original(comfy: Comfy, original: dict[str, Tensor]) -> None:
    residual, _ = split_here(comfy)
    model, clip = as_comfyui_has_it(load_file(comfy.folders["checkpoints"] / residual))
    assert worst(model | clip, original) > 0.1


def test_restored_it_is_the_original_to_the_last_bit(comfy: Comfy, original: dict[str, Tensor]) -> None:
    found = load(comfy, *split_here(comfy), method="restore")
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], weight) for name, weight in original.items())
    file = load_file(comfy.folders["checkpoints"] / BASE)
    (state,) = comfy.loaded_states
    assert state.keys() == file.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in file.items())


@pytest.mark.parametrize("method", ["patch", "restore"])
def test_a_wrong_pair_is_an_error_with_both_hashes(comfy: Comfy, method: str) -> None:
    residual, _ = split_here(comfy, "model's own")
    _, other = split_here(comfy, "model's own", rank=2, residual_folder="two", principal_folder="two")
    with pytest.raises(
        RuntimeError,
        match=r"belongs to principal [0-9a-f]{16}, .* is principal [0-9a-f]{16}\nhint: pass the two",
    ):
        load(comfy, residual, other, method)


def test_a_whole_model_is_no_residual(comfy: Comfy) -> None:
    _, principal = split_here(comfy)
    with pytest.raises(RuntimeError, match="is not a residual of spectune"):
        load(comfy, BASE, principal)


def test_the_names_may_come_from_a_small_split(comfy: Comfy, original: dict[str, Tensor]) -> None:
    residual, principal = split_here(comfy)
    found = load(comfy, "none", "none", residual_file=residual, principal_file=principal)
    assert worst(found, original) < 4 * RANK * EPS


def test_no_choice_is_an_error(comfy: Comfy) -> None:
    residual, _ = split_here(comfy)
    with pytest.raises(
        RuntimeError, match="no principal is chosen\nhint: choose a file, or connect principal_file"
    ):
        load(comfy, residual, "none")


def test_a_tuned_adapter_takes_the_place_of_its_principal(comfy: Comfy, tmp_path: Path) -> None:
    base = comfy.folders["checkpoints"] / BASE
    report = small_split(base, tmp_path / "parts", rank=RANK, residual_dtype=torch.float32)
    assert report.residual is not None
    report.residual.rename(comfy.folders["checkpoints"] / "r.safetensors")
    tuned = saved_tuned(tuned_from(base, report, size=0.05), comfy.folders["loras"] / "t.safetensors")
    spectune.rebuild(tuned, base, tmp_path / "rebuilt.safetensors", dtype="float32")
    model, clip = as_comfyui_has_it(load_file(tmp_path / "rebuilt.safetensors"))
    assert worst(load(comfy, "r.safetensors", "t.safetensors"), model | clip) < 8 * RANK * EPS


def test_a_layer_without_a_weight_is_not_skipped(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = split_here(comfy)
    whole = as_comfyui_has_it
    gone = "diffusion_model.middle_block.1.proj_in.weight"

    def lacking(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model, clip = whole(tensors)
        return {name: weight for name, weight in model.items() if name != gone}, clip

    monkeypatch.setattr("tests.comfyui_nodes.fakes.as_comfyui_has_it", lacking)
    with pytest.raises(RuntimeError, match=rf"1 of \d+ layers have no weight in .*: {gone}\nhint"):
        load(comfy, *pair)


def test_other_files_are_loaded_anew(comfy: Comfy) -> None:
    residual, principal = split_here(comfy)
    node = comfy.nodes.NODE_CLASS_MAPPINGS["SpectuneLoadPair"]
    before = node.IS_CHANGED(residual=residual, principal=principal, method="patch")
    path = comfy.folders["loras"] / principal
    changed_copy(path, path, {"more": torch.zeros(8)})
    assert node.IS_CHANGED(residual=residual, principal=principal, method="patch") != before
    node.IS_CHANGED(residual=None, principal=None, method="patch")  # as ComfyUI asks for linked inputs
