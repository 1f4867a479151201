"""The setup of a run follows the recipe and is immutable."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
from accelerate import Accelerator

from spectune.model.noise_levels import LogitNormal
from spectune.model.prediction import Ddpm, Flow
from spectune.training.callbacks import Callbacks
from spectune.training.setup import assemble
from tests.training.conftest import MakeRecipe


@pytest.mark.parametrize(
    ("objective", "prediction"),
    [
        (
            {
                "kind": "flow",
                "flow_shift": 2.5,
                "flow_times": "logit_normal",
                "flow_times_mean": 0.5,
                "flow_times_std": 2.0,
            },
            Flow(2.5, LogitNormal(0.5, 2.0)),
        ),
        ({"kind": "v", "zero_terminal_snr": True}, Ddpm("v", True)),
        ({"kind": "eps", "zero_terminal_snr": True}, Ddpm("eps", True)),
        ({}, Ddpm("eps", False)),
    ],
    ids=["flow", "v", "eps", "default"],
)
def test_the_recipe_determines_the_prediction(
    make_recipe: MakeRecipe, objective: dict[str, object], prediction: Flow | Ddpm
) -> None:
    run = assemble(make_recipe(objective=objective), Accelerator(cpu=True), Callbacks())
    assert run.objective.prediction == prediction
    assert run.preview_model.sdxl.prediction == prediction
    assert run.objective.cost.options.prediction == prediction.name


def test_batches_of_one_image_are_reported_if_the_loss_uses_other_images(make_recipe: MakeRecipe) -> None:
    flow = {"kind": "flow", "flow_pairing": "optimal_transport"}
    found = {}
    for batch in (11, 12):  # of 12 draws
        recipe = make_recipe(objective=flow, model={"parts": ["unet"]}, run={"batch": batch})
        run = assemble(recipe, Accelerator(cpu=True), Callbacks())
        found[batch] = [text for text in run.warnings.entries if "one image" in text]
    assert found[12] == []
    assert found[11] == [
        "each epoch has 1 batch with one image: objective.flow_pairing and loss.contrastive_weight do "
        "nothing there"
    ]


def test_the_setup_is_immutable(make_recipe: MakeRecipe) -> None:
    run = assemble(make_recipe(), Accelerator(cpu=True), Callbacks())
    for record, field in (
        (run, "steps"),
        (run.data, "hash"),
        (run.model, "offload"),
        (run.objective, "seed"),
    ):
        with pytest.raises(FrozenInstanceError):
            setattr(record, field, None)
