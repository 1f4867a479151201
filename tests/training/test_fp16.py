"""Training in fp16: the loss is scaled, overflows skip a step and are counted, and a run can resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.amp.grad_scaler import GradScaler

from spectune.errors import SpectuneError
from spectune.training import setup
from spectune.training.callbacks import Callbacks, StepInfo
from spectune.training.loop import train
from spectune.training.objective.cost import Cost
from tests.training.conftest import MakeRecipe

FP16 = {"precision": "fp16"}


class Norms(Callbacks):
    def __init__(self) -> None:
        self.all: list[float] = []

    def on_step(self, info: StepInfo) -> None:
        self.all.append(info.grad_norm)


def scaled_by(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    def make(device: str, *, enabled: bool) -> GradScaler:
        return GradScaler(device, init_scale=scale, enabled=enabled)

    monkeypatch.setattr(setup, "GradScaler", make)


def trained(make_recipe: MakeRecipe, output: Path, **run: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    norms = Norms()
    report = train(make_recipe(run={"output": output, **run}), callbacks=[norms])
    assert not any("fp16" in warning for warning in report.warnings)
    return load_file(output / "t.safetensors"), norms.all


def test_fp16_trains_like_float32(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    plain, norms = trained(make_recipe, tmp_path / "plain")
    half, half_norms = trained(make_recipe, tmp_path / "half", **FP16)
    # unscaled gradients, from activations of 11 bits
    assert half_norms == pytest.approx(norms, rel=0.02)
    changed = [name for name in plain if "delta" in name]
    assert changed
    one, other = (torch.cat([t[name].flatten() for name in changed]).double() for t in (plain, half))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.95


@pytest.mark.slow
def test_the_scale_does_not_change_the_result(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled_by(monkeypatch, 1024.0)
    _, norms = trained(make_recipe, tmp_path / "small", **FP16)
    scaled_by(monkeypatch, 4096.0)
    _, others = trained(make_recipe, tmp_path / "large", **FP16)
    assert norms == pytest.approx(others, rel=0.01)


def test_steps_that_overflow_are_skipped_and_counted(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled_by(monkeypatch, 2.0**40)
    norms = Norms()
    report = train(make_recipe(run={"steps": 4, **FP16}), callbacks=[norms])
    assert report.steps == 4
    assert not any(map(torch.isfinite, map(torch.tensor, norms.all)))
    assert report.warnings[-1] == (
        "4 steps of 4 changed nothing: gradients overflowed in fp16, and the loss scale was halved each time"
    )
    tensors = load_file(tmp_path / "out" / "t.safetensors")
    assert all(not tensor.any() for name, tensor in tensors.items() if "delta" in name)


def test_gradients_that_overflow_without_a_scale_end_the_run(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled_by(monkeypatch, 1.0)
    monkeypatch.setattr(Cost, "of_batch", lambda self, noised, costs, **_: costs.mean() * 1e30)  # pyright: ignore
    with pytest.raises(SpectuneError, match="the gradients of step 1 overflow in fp16 even without") as error:
        train(make_recipe(run=FP16))
    assert error.value.hint == 'set run.precision = "bf16" or "fp32"'


@pytest.mark.slow
def test_a_resumed_run_keeps_its_scale(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled_by(monkeypatch, 2.0**22)
    whole = tmp_path / "whole"
    train(make_recipe(run={"output": whole, "steps": 8, **FP16}))
    parts = tmp_path / "parts"
    train(make_recipe(run={"output": parts, "steps": 5, **FP16}))
    scaled_by(monkeypatch, 1.0)
    train(make_recipe(run={"output": parts, "steps": 8, **FP16}))
    assert any(tensor.any() for name, tensor in load_file(whole / "t.safetensors").items() if "delta" in name)
    assert (whole / "t.safetensors").read_bytes() == (parts / "t.safetensors").read_bytes()


def test_a_learned_weighting_gets_unscaled_gradients(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    loss = {"weighting": "edm2"}
    plain = train(make_recipe(loss=loss, run={"output": tmp_path / "a"}))
    half = train(make_recipe(loss=loss, run={"output": tmp_path / "b", **FP16}))
    assert half.training_loss == pytest.approx(plain.training_loss, rel=0.02)
    name = next(path.name for path in (tmp_path / "a").glob("*.state"))
    one, other = (load_file(tmp_path / run / name / "extras.safetensors") for run in ("a", "b"))
    key = next(name for name in one if "weighting" in name and name.endswith("weight"))
    torch.testing.assert_close(other[key], one[key], rtol=0.05, atol=1e-3)
