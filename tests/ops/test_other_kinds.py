"""Adapters that are more than a product of two factors: export, convert, slice and inspect."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectune.checkpoints.open import open_checkpoint
from spectune.cli.app import run
from spectune.errors import InputError
from spectune.files.source import MemorySource
from spectune.ops.convert import convert
from spectune.ops.export import export
from spectune.ops.inspect import inspect
from spectune.ops.inspect.summary import AdapterSummary
from spectune.ops.options.values import Slice
from spectune.ops.rebuild import rebuild
from spectune.ops.slice import slice
from spectune.ops.slice.adapters import SliceReport
from spectune.sdxl.layers import build_catalogue
from tests.file_kinds.adapters import ADAPTERS, Model
from tests.file_kinds.checkpoints import CHANGED

OTHERS = ("LoHa", "LoKr", "DoRA", "full matrices, biases and norms", "OFT")


@pytest.fixture(scope="module")
def model(source: MemorySource) -> Model:
    torch.manual_seed(0)
    return Model(source.values, build_catalogue(source, all_layers=True))


def written(kind: str, model: Model, folder: Path) -> Path:
    return ADAPTERS[kind](model, folder)


def weight_of(path: Path) -> Tensor:
    with open_checkpoint(path) as file:
        return file.load(CHANGED).double()


@pytest.mark.parametrize("kind", OTHERS)
def test_the_stated_loss_of_the_exported_lora_is_the_measured_one(
    kind: str, model: Model, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    adapter = written(kind, model, tmp_path)
    report = export(adapter, tmp_path / "lora.safetensors", base=tiny_checkpoint, rank=3, dtype="float32")
    rebuild(tiny_checkpoint, adapter, tmp_path / "exact.safetensors", dtype="float32")
    rebuild(tiny_checkpoint, tmp_path / "lora.safetensors", tmp_path / "near.safetensors", dtype="float32")
    original = model.tensors[CHANGED].double()
    exact, near = (weight_of(tmp_path / f"{name}.safetensors") for name in ("exact", "near"))
    measured = float((near - exact).norm() / (exact - original).norm())
    assert [layer.name for layer in report.layers] == [model.linear.name]
    assert report.error == pytest.approx(measured, abs=1e-5)
    assert report.error < 0.9
    assert (report.outside_share > 0) is kind.startswith("full")


def test_export_of_another_kind_requires_its_model(model: Model, tmp_path: Path) -> None:
    adapter = written("LoHa", model, tmp_path)
    with pytest.raises(InputError, match="more than a product of two factors") as caught:
        export(adapter, tmp_path / "lora.safetensors")
    assert caught.value.hint == "pass the model it was made from as `base`"


@pytest.mark.parametrize("kind", OTHERS)
def test_convert_copies_the_tensors(kind: str, model: Model, tmp_path: Path) -> None:
    adapter = written(kind, model, tmp_path)
    report = convert(adapter, tmp_path / "copy.safetensors")
    before, after = load_file(adapter), load_file(tmp_path / "copy.safetensors")
    assert report.count == len(before) == len(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(InputError, match="its tensors are copied, so `keys`, `dtype` cannot apply"):
        convert(adapter, tmp_path / "other.safetensors", keys="comfyui", dtype="bfloat16")


def test_a_drop_of_the_magnitudes_says_by_how_much_the_change_differs(
    model: Model, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    adapter = written("DoRA", model, tmp_path)
    drop = ("*.dora_scale",)
    (text,) = convert(adapter, tmp_path / "a.safetensors", drop=drop).warnings
    assert text.endswith("is another adapter, not the same one with fewer keys; pass `base` to measure by "
                         "how much it differs")  # fmt: skip
    (text,) = convert(adapter, tmp_path / "b.safetensors", base=tiny_checkpoint, drop=drop).warnings
    tensors, stem = load_file(adapter), model.linear.kohya
    original = model.tensors[CHANGED].double()
    product = tensors[f"{stem}.lora_up.weight"].double() @ tensors[f"{stem}.lora_down.weight"].double()
    moved = original + product
    magnitude = tensors[f"{stem}.dora_scale"].double()
    change = moved * magnitude / moved.norm(dim=1, keepdim=True) - original
    share = float((change - product).norm() / change.norm())
    assert f"differs by {share:.1%} of the original change" in text


def test_slice_copies_the_layers_of_a_trait(model: Model, tiny_checkpoint: Path, tmp_path: Path) -> None:
    both = load_file(written("LoHa", model, tmp_path)) | load_file(written("DoRA", model, tmp_path))
    stem = model.linear.kohya
    loha = {key: tensor for key, tensor in both.items() if "hada" in key}
    other = {
        key.replace(stem, "lora_unet_middle_block_1_proj_out"): tensor
        for key, tensor in both.items()
        if key not in loha
    }
    save_file(loha | other, tmp_path / "both.safetensors")
    piece = Slice(tmp_path / "both.safetensors", model.linear.name)
    report = slice((piece,), tmp_path / "one.safetensors", base=tiny_checkpoint)
    assert isinstance(report, SliceReport)
    assert report.slices[0].kept == (model.linear.name,)
    assert report.slices[0].removed == ("unet.middle_block.1.proj_out",)
    kept = load_file(tmp_path / "one.safetensors")
    assert set(kept) == set(loha)
    with pytest.raises(InputError, match="the tensors are copied, so a weight cannot apply"):
        slice((replace(piece, weight=0.5),), tmp_path / "two.safetensors", base=tiny_checkpoint)


@pytest.mark.parametrize(
    ("kind", "shown"),
    [("LoHa", "LoHa"), ("LoKr", "LoKr"), ("DoRA", "DoRA of LoRA"), ("OFT", "OFT or BOFT")],
)
def test_inspect_counts_the_layers_of_each_kind(
    kind: str, shown: str, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = written(kind, model, tmp_path)
    summary = inspect(adapter)
    assert isinstance(summary, AdapterSummary)
    assert sum(summary.layers.values()) == 1
    assert run(["inspect", str(adapter)]) == 0
    assert f"kinds         {shown}" in capsys.readouterr().err
