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
    told = {"rank": 0, "keys": "kohya", "dtype": "float16", "name": "out", "overwrite": False, "base": BASE}
    (name,) = comfy.run("SpectuneExport", source=source, **{**told, **changes})
    return comfy.folders["loras"] / name


def cut(comfy: Comfy, slices: str, **changes: Any) -> Path:
    told = {"name": "sliced", "overwrite": False, "base": BASE}
    (name,) = comfy.run("SpectuneSlice", slices=slices, **{**told, **changes})
    return comfy.folders["loras"] / name


def test_the_lora_is_that_of_the_library(comfy: Comfy, tuned: Path, tmp_path: Path) -> None:
    out = export(comfy, name="folder/style.safetensors")
    assert out == comfy.folders["loras"] / "folder" / "style.safetensors"
    spectune.export(tuned, tmp_path / "style.safetensors", base=comfy.folders["checkpoints"] / BASE)
    assert out.read_bytes() == (tmp_path / "style.safetensors").read_bytes()


def test_rank_keys_and_type_are_passed_on(comfy: Comfy) -> None:
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
        RuntimeError, match="is a whole model: its LoRA is the difference from another model\nhint"
    ):
        export(comfy, "checkpoints/full.safetensors", name="two", base="none")


def test_the_list_has_both_kinds(comfy: Comfy) -> None:
    inputs = comfy.nodes.NODE_CLASS_MAPPINGS["SpectuneExport"].INPUT_TYPES()
    assert inputs["required"]["source"][0] == [f"loras/{NAME}", f"checkpoints/{BASE}"]


def test_existing_files_stay_unless_told_otherwise(comfy: Comfy, tuned: Path) -> None:
    before = tuned.read_bytes()
    for run in (export, lambda comfy, **more: cut(comfy, NAME, **more)):
        with pytest.raises(RuntimeError, match="is there already, in loras"):
            run(comfy, name="tuned")
        with pytest.raises(RuntimeError, match=r"\nhint: "):  # what is read is never written
            run(comfy, name="tuned", overwrite=True)
    assert tuned.read_bytes() == before
    first = export(comfy).read_bytes()
    assert export(comfy, rank=1, overwrite=True).read_bytes() != first


def test_slices_are_those_of_the_library(comfy: Comfy, tmp_path: Path) -> None:
    lora = export(comfy, name="lora")
    out = cut(comfy, "\n# both parts\nlora.safetensors:unet:0.5\n\n  lora.safetensors:te1  \n")
    wanted = [f"{lora}:unet:0.5", f"{lora}:te1"]
    spectune.slice(wanted, tmp_path / "sliced.safetensors", base=comfy.folders["checkpoints"] / BASE)
    found, expected = load_file(out), load_file(tmp_path / "sliced.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert not any("te2" in key for key in found)


def test_traits_of_ones_own_are_a_text(comfy: Comfy) -> None:
    export(comfy, name="lora")
    out = cut(
        comfy, "lora.safetensors:cross", traits='{"cross": {"whitelist": ["attn2"], "blacklist": ["to_k"]}}'
    )
    stems = {key.partition(".")[0] for key in load_file(out)}
    assert stems
    assert all("attn2" in stem and "to_k" not in stem for stem in stems)


def test_what_cannot_be_read_is_told(comfy: Comfy) -> None:
    with pytest.raises(
        RuntimeError, match=r"gone.safetensors is not in the list of LoRAs\nhint: write names as"
    ):
        cut(comfy, "gone.safetensors:te")
    with pytest.raises(RuntimeError, match="unreadable slice 'tuned'\nhint: write it like"):
        cut(comfy, "tuned")
    with pytest.raises(RuntimeError, match="no files to combine"):
        cut(comfy, "# nothing")
    with pytest.raises(RuntimeError, match="cannot read traits"):
        cut(comfy, f"{NAME}:te", traits="{")
    assert comfy.files("loras") == [NAME]
