"""Trainings that start from a tuned adapter: `model.start`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import spectune
from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError, PairingError
from spectune.files.weights_hash import weights_hash
from spectune.training.loop import train
from spectune.training.recipe.defaults import with_defaults
from spectune.training.recipe.sections.model import ModelSection
from spectune.training.trainable_model import build_trainable
from tests.sample_pairs import changed_copy, recast
from tests.training.conftest import MakeRecipe
from tests.training.test_loop import Losses, same_tensors
from tests.training.test_trainable_model import predict


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recast(tiny_checkpoint, tmp_path_factory.mktemp("start") / "base.safetensors", torch.float32)


@pytest.fixture(scope="module")
def start(base: Path) -> Path:
    """Return a tuned adapter, extracted from a checkpoint with other layers."""
    generator = torch.Generator().manual_seed(0)
    changes = {
        name: tensor + 0.05 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(base).items()
        if tensor.ndim > 1 and "model.diffusion_model." in name
    }
    tuned = changed_copy(base, base.with_name("tuned.safetensors"), changes)
    return spectune.export(tuned, base.with_name("start.safetensors"), base=base, form="tuned", rank=4).path


@pytest.fixture(scope="module")
def rebuilt(base: Path, start: Path) -> Path:
    return spectune.rebuild(base, start, base.with_name("rebuilt.safetensors")).path


@pytest.mark.parametrize("form", ["delta", "residual"])
def test_the_model_before_step_1_is_the_tuned_one(base: Path, start: Path, rebuilt: Path, form: Any) -> None:
    started = build_trainable(ModelSection(base=base, start=start, form=form))
    expected = predict(build_trainable(ModelSection(base=rebuilt, rank=1)).sdxl)
    of_base = predict(build_trainable(ModelSection(base=base, rank=1)).sdxl)
    scale = (expected - of_base).abs().max()
    assert scale > 1e-3 * of_base.abs().max()
    assert (predict(started.sdxl) - expected).abs().max() < 1e-2 * scale
    declared = started.provenance
    with open_checkpoint(start) as file:
        assert (declared.start_name, declared.start_hash) == ("start.safetensors", weights_hash(file))
    assert (declared.base_name, declared.frame) == ("base.safetensors", "principal")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["delta", "residual"])
def test_a_run_starts_with_the_loss_of_the_tuned_model_and_resumes(
    base: Path,
    start: Path,
    rebuilt: Path,
    picture_folder: Path,
    make_recipe: MakeRecipe,
    tmp_path: Path,
    form: str,
) -> None:
    validation = {"validation_folder": picture_folder / "held_out"}

    def run(name: str, model: dict[str, Any], steps: int) -> tuple[Path, Losses]:
        losses, settings = Losses(), {"output": tmp_path / name, "steps": steps, "validate_every_steps": 1}
        train(make_recipe(model=model, data=validation, run=settings), callbacks=[losses])
        return tmp_path / name / "t.safetensors", losses

    model = {"base": base, "rank": ..., "layers": ..., "start": start, "form": form}
    whole, losses = run("whole", model, 2)
    _, of_tuned = run("tuned", {"base": rebuilt, "rank": 2}, 1)
    _, of_base = run("base", {"base": base, "rank": 2}, 1)
    assert losses.validation[0] == pytest.approx(of_tuned.validation[0], rel=1e-4)
    assert losses.by_step[1] == pytest.approx(of_tuned.by_step[1], rel=1e-4)
    assert abs(of_base.validation[0] / of_tuned.validation[0] - 1) > 2e-4
    run("parts", model, 1)
    resumed, _ = run("parts", model, 2)
    assert same_tensors(whole, resumed)
    with open_checkpoint(whole) as written:
        assert written.provenance.start_name == "start.safetensors"
    # the result is a start again, for the same base
    again = build_trainable(ModelSection(base=base, start=whole))
    assert again.provenance.start_name == "t.safetensors"


def test_keys_follow_the_start(base: Path, start: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    values = load_file(start)
    flow = tmp_path / "flow.safetensors"
    with open_checkpoint(start) as file:
        declared = dict(file.metadata) | {"spectune.prediction": "flow", "spectune.flow_shift": "2.5"}
    save_file(values, flow, metadata=declared)
    recipe = with_defaults(
        make_recipe(model={"base": base, "rank": ..., "layers": ..., "start": flow}), "cpu"
    )
    assert (recipe.objective.kind, recipe.objective.flow_shift) == ("flow", 2.5)
    with pytest.raises(InputError, match=r"model.start continues from a tuned adapter"):
        make_recipe(
            model={"base": base, "rank": ..., "layers": ..., "start": flow},
            objective={"kind": "flow", "start": "warm"},
        )
    with pytest.raises(InputError, match="set either `principal`"):
        make_recipe(model={"base": base, "rank": 2, "start": start})


def test_other_files_are_refused(base: Path, start: Path, rebuilt: Path, tmp_path: Path) -> None:
    lora = spectune.export(start, tmp_path / "lora.safetensors", base=base).path
    with pytest.raises(InputError, match=r"model.start: lora.safetensors is not a tuned adapter"):
        build_trainable(ModelSection(base=base, start=lora))
    with pytest.raises(PairingError, match=r"start.safetensors was trained from base"):
        build_trainable(ModelSection(base=rebuilt, start=start))
    with pytest.raises(InputError, match=r"start.safetensors changes .* layers outside model.parts: unet"):
        build_trainable(ModelSection(base=base, start=start, parts=("te1", "te2")))
    # its text encoders did not change
    assert build_trainable(ModelSection(base=base, start=start, parts=("unet",))).injection.layers
