"""Test the nodes Export LoRA and Slice LoRAs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import spectune
from tests.comfyui_nodes.conftest import BASE
from tests.comfyui_nodes.fakes import Comfy

NAME = "tuned.safetensors"


@pytest.fixture(autouse=True)
def tuned(comfy: Comfy, tuned_file: Path) -> Path:
    return Path(shutil.copy(tuned_file, comfy.folders["loras"] / NAME))


def export(comfy: Comfy, source: str = f"loras/{NAME}", **changes: Any) -> Path:
    inputs = {"rank": 0, "keys": "kohya", "dtype": "float16", "name": "out", "overwrite": False, "base": BASE}
    (name,) = comfy.run("SpectuneExport", source=source, **{**inputs, **changes})
    return comfy.folders["loras"] / name


def cut(comfy: Comfy, slices: str, **changes: Any) -> Path:
    inputs = {"name": "sliced", "overwrite": False, "base": BASE}
    (name,) = comfy.run("SpectuneSlice", slices=slices, **{**inputs, **changes})
    return comfy.folders["loras"] / name


def test_export_writes_the_same_file_as_the_library(comfy: Comfy, tuned: Path, tmp_path: Path) -> None:
    out = export(comfy, name="folder/style.safetensors")
    assert out == comfy.folders["loras"] / "folder" / "style.safetensors"
    spectune.export(tuned, tmp_path / "style.safetensors", base=comfy.folders["checkpoints"] / BASE)
    assert out.read_bytes() == (tmp_path / "style.safetensors").read_bytes()


def test_rank_keys_and_dtype_are_passed_to_the_library(comfy: Comfy) -> None:
    tensors = load_file(export(comfy, rank=3, keys="comfyui", dtype="float32"))
    downs = {key: tensor for key, tensor in tensors.items() if key.endswith("lora_down.weight")}
    assert {tensor.shape[0] for tensor in downs.values()} == {3}
    assert {tensor.dtype for tensor in downs.values()} == {torch.float32}
    assert any(key.startswith("text_encoders.clip_g.transformer.") for key in downs)


def test_a_checkpoint_is_exported_against_its_base(comfy: Comfy, tuned: Path) -> None:
    checkpoints = comfy.folders["checkpoints"]
    spectune.rebuild(tuned, checkpoints / BASE, checkpoints / "full.safetensors")
    out = export(comfy, "checkpoints/full.safetensors", rank=2)
    assert {t.shape[0] for key, t in load_file(out).items() if key.endswith("lora_down.weight")} == {2}
    with pytest.raises(
        RuntimeError, match="is a checkpoint: its LoRA is the difference from another checkpoint\nhint"
    ):
        export(comfy, "checkpoints/full.safetensors", name="two", base="none")


def test_the_list_contains_loras_and_checkpoints(comfy: Comfy) -> None:
    inputs = comfy.nodes.NODE_CLASS_MAPPINGS["SpectuneExport"].INPUT_TYPES()
    assert inputs["required"]["source"][0] == [f"loras/{NAME}", f"checkpoints/{BASE}"]


def test_existing_files_are_kept_without_overwrite(comfy: Comfy, tuned: Path) -> None:
    before = tuned.read_bytes()
    for run in (export, lambda comfy, **more: cut(comfy, NAME, **more)):
        with pytest.raises(RuntimeError, match="already exists in loras"):
            run(comfy, name="tuned")
        with pytest.raises(RuntimeError, match=r"\nhint: "):  # an input is never overwritten
            run(comfy, name="tuned", overwrite=True)
    assert tuned.read_bytes() == before
    first = export(comfy).read_bytes()
    assert export(comfy, rank=1, overwrite=True).read_bytes() != first


def test_slice_writes_the_same_file_as_the_library(comfy: Comfy, tmp_path: Path) -> None:
    lora = export(comfy, name="lora")
    out = cut(comfy, "\n# both parts\nlora.safetensors:unet:0.5\n\n  lora.safetensors:te1  \n")
    slices = [f"{lora}:unet:0.5", f"{lora}:te1"]
    spectune.slice(slices, tmp_path / "sliced.safetensors", base=comfy.folders["checkpoints"] / BASE)
    actual, expected = load_file(out), load_file(tmp_path / "sliced.safetensors")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())
    assert not any("te2" in key for key in actual)


def test_additional_traits_are_json_text(comfy: Comfy) -> None:
    export(comfy, name="lora")
    out = cut(
        comfy, "lora.safetensors:cross", traits='{"cross": {"whitelist": ["attn2"], "blacklist": ["to_k"]}}'
    )
    stems = {key.partition(".")[0] for key in load_file(out)}
    assert stems
    assert all("attn2" in stem and "to_k" not in stem for stem in stems)


def test_wrong_inputs_are_errors(comfy: Comfy) -> None:
    with pytest.raises(
        RuntimeError, match=r"gone.safetensors is not in the list of LoRAs\nhint: write the name as"
    ):
        cut(comfy, "gone.safetensors:te")
    with pytest.raises(RuntimeError, match=r"cannot parse slice 'tuned': .*\nhint: for example"):
        cut(comfy, "tuned")
    with pytest.raises(RuntimeError, match="`slices` is empty"):
        cut(comfy, "# nothing")
    with pytest.raises(RuntimeError, match="cannot read traits"):
        cut(comfy, f"{NAME}:te", traits="{")
    assert comfy.files("loras") == [NAME]
