"""7 and 9. Text encoders: stopped early, or not trained. 3D style, all parts, validation captions."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from experiments import near_full
from experiments.experiment import Experiment, finals, mean, on_seeds, spread, table
from experiments.lab import recipe_of, train_recipe, validation_loss
from experiments.trial import Outcome, Trial, save
from spectune.adapters.adapter import TunedAdapter
from spectune.adapters.reader import open_adapter
from spectune.checkpoints.open import open_checkpoint
from spectune.core.delta import Delta
from spectune.sdxl.layers import build_catalogue
from spectune.training.callbacks import Callbacks
from spectune.training.output import adapter_file
from spectune.training.run import Run
from spectune.training.setup import assemble

NAME = "encoders"
STOPS = (0, 20, 40, 80, 120)  # steps after which the training of the encoders stops


def all_parts() -> Trial:
    trial = near_full.chosen()["principal r16"]
    return Trial(
        NAME,
        "all parts",
        trial.rate,
        overrides={
            "model": {"parts": ["unet", "te1", "te2"]},
            "run": {"save_every_steps": 20, "keep_last": 10},
        },
        keep=True,
    )


def trials() -> list[Trial]:
    return on_seeds([all_parts()])


def run(trial: Trial, work: Path) -> Outcome:
    """Train all parts, then combine the final UNet with the encoders after each of STOPS."""
    trained = train_recipe(trial, work)
    recipe = recipe_of(trial, work)
    output, name = recipe.run.output, recipe.run.name
    files = {step: adapter_file(output, name, step) for step in STOPS if 0 < step < trial.steps}
    files[trial.steps] = adapter_file(output, name)
    run = assemble(recipe, Accelerator(), Callbacks())
    deltas = {step: read_deltas(path, recipe.model.checkpoint) for step, path in files.items()}
    untrained = {name: without_change(delta) for name, delta in deltas[trial.steps].items()}
    losses = {
        str(stop): loss_of(run, mixed(deltas[trial.steps], deltas.get(stop, untrained))) for stop in STOPS
    }
    shutil.rmtree(output, ignore_errors=True)
    outcome = replace(trained, extra={"encoders_of_step": losses})
    save(trial, outcome)
    return outcome


def read_deltas(path: Path, base: Path) -> dict[str, Delta]:
    with (
        open_checkpoint(base) as source,
        open_adapter(path, build_catalogue(source, all_layers=True)) as tuned,
    ):
        assert isinstance(tuned, TunedAdapter)
        return {name: tuned.layers[name] for name in tuned.layers}


def without_change(delta: Delta) -> Delta:
    return Delta(delta.frame, torch.zeros_like(delta.down), torch.zeros_like(delta.up))


def mixed(last: dict[str, Delta], encoders: dict[str, Delta]) -> dict[str, Delta]:
    """Combine the UNet of `last` with the text encoders of `encoders`."""
    return {name: (last if name.startswith("unet") else encoders)[name] for name in last}


def loss_of(run: Run, deltas: dict[str, Delta]) -> float:
    run.model.injection.load(deltas)
    return validation_loss(run)


def page_values() -> dict[str, str]:
    outcomes = finals(trials())["all parts"]
    last = [outcome.extra["encoders_of_step"][str(STOPS[-1])] for outcome in outcomes]
    rows: list[list[str]] = []
    for stop in STOPS:
        losses = [outcome.extra["encoders_of_step"][str(stop)] for outcome in outcomes]
        cost = [100 * (one / other - 1) for one, other in zip(losses, last, strict=True)]
        rows.append([str(stop), f"{spread(losses):.5f}", f"{spread(cost):+.2f} %"])
    unet = finals(near_full.repeats())["principal r16"]
    return {
        "stops": table(["encoders of step", "validation loss", "relative to the last step"], rows),
        "all": f"{spread(last):.5f}",
        "unet": f"{spread(outcome.final for outcome in unet):.5f}",
        "difference": f"{100 * (mean(outcome.final for outcome in unet) / mean(last) - 1):+.1f} %",
    }


ENCODERS = Experiment(NAME, (trials,), page_values, runner=run, needs=("near_full",))
