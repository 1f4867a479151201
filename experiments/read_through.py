"""The loss of flow through the bridge, or the loss of EPS with min-SNR? 3D style, the file stays EPS."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from experiments import figures
from experiments.experiment import Experiment, finals, on_seeds, spread, table
from experiments.lab import recipe_of
from experiments.trial import Outcome, Trial, load, save
from spectune.model.prediction import Ddpm
from spectune.training.callbacks import Callbacks
from spectune.training.data.plan import PlannedBatches
from spectune.training.eps_to_flow.bridge import Bridge
from spectune.training.run import Progress, Run
from spectune.training.setup import assemble
from spectune.training.train_step import train_batch
from spectune.training.validation import validation_loss

NAME = "read_through"
STEPS, BATCH = 30, 8
RATE = 2e-4  # the best one of the principal in near_full, which had no weighting
LEVELS = 4  # timesteps at which the EPS loss is measured
LOW = 2  # the first of them, with less noise: timesteps 125 and 375
METHODS: Mapping[str, Mapping[str, Any]] = {
    "EPS, min-SNR": {"loss": {"weighting": "min_snr"}},
    "flow through the bridge": {"objective": {"kind": "eps", "read_through": "bridge"}},
}


@dataclass(frozen=True)
class AtTimestep(Ddpm):
    """EPS, measured at one timestep."""

    time: int = 0

    def even_times(self, count: int, *, pixels: int | None = None) -> Tensor:
        return torch.full((count,), self.time)


def trial(label: str) -> Trial:
    overrides = {**METHODS[label], "run": {"batch": BATCH}}
    return Trial(NAME, label, RATE, steps=STEPS, validate_every=STEPS, overrides=overrides)


def reference() -> Trial:
    """Return the trial that only measures the base."""
    return Trial(NAME, "base", RATE, overrides={"run": {"batch": BATCH}})


def repeats() -> list[Trial]:
    return [reference(), *on_seeds(trial(label) for label in METHODS)]


def times() -> list[int]:
    return Ddpm().even_times(LEVELS).tolist()


def by_timestep(run: Run) -> list[float]:
    """Return the EPS loss on the validation images at each timestep of `times`."""
    run.model.denoiser.eval()
    return [
        validation_loss(
            run.model.denoiser,
            run.data.validation,
            AtTimestep(time=time),
            times=1,
            batch=run.recipe.run.batch,
        )
        for time in times()
    ]


def measure(trial: Trial, work: Path) -> Outcome:
    """Train with the batches and steps of spectune's loop, and measure the EPS loss by timestep."""
    steps = 0 if trial == reference() else trial.steps
    run = assemble(recipe_of(trial, work), Accelerator(), Callbacks())
    progress = Progress()
    run.optimization.network.train()
    for draws in PlannedBatches(run.data.plan, 0, steps):
        train_batch(run, run.data.pictures.__getitems__(draws), progress)
        progress.step += 1
    losses = by_timestep(run)
    parameters = sum(tensor.numel() for tensor in run.optimization.parameters.values())
    outcome = Outcome(((steps, statistics.fmean(losses)),), parameters, {"by_timestep": losses})
    save(trial, outcome)
    return outcome


def flow_loss(losses: Sequence[float]) -> float:
    """Return the loss of flow for s uniform in the schedule, from the EPS losses by timestep."""
    levels = Bridge().levels
    edges = [round(index * 1000 / LEVELS) for index in range(LEVELS)] + [999]
    total = 0.0
    for low, high, time, loss in zip(edges[:-1], edges[1:], times(), losses, strict=True):
        total += float(levels[high] - levels[low]) * loss / float(1 - levels[time]) ** 2
    return total / float(levels[-1] - levels[0])


MEASURES = {
    "EPS loss": statistics.fmean,
    "t < 500": lambda losses: statistics.fmean(losses[:LOW]),
    "t >= 500": lambda losses: statistics.fmean(losses[LOW:]),
    "loss of flow": flow_loss,
}


def page_values() -> dict[str, str]:
    outcomes = finals(repeats()[1:])
    base = load(reference()).extra["by_timestep"]
    rows = [["base", *(f"{measured(base):.4f}" for measured in MEASURES.values())]]
    gains: dict[str, list[float]] = {}
    for label, seeds in outcomes.items():
        losses = [outcome.extra["by_timestep"] for outcome in seeds]
        rows.append([label, *(f"{spread(map(measured, losses))}" for measured in MEASURES.values())])
        means = [statistics.fmean(column) for column in zip(*losses, strict=True)]
        gains[label] = [100 * (1 - after / before) for after, before in zip(means, base, strict=True)]
    return {
        "plot": _plot(gains),
        "table": table(["method", *MEASURES], rows),
        "steps": str(STEPS),
        "rate": f"{RATE:g}",
        "levels": str(LEVELS),
        "weight_low": f"{1 / float(1 - Bridge().levels[0]) ** 2:.2f}",
        "weight_high": f"{1 / float(1 - Bridge().levels[-1]) ** 2:.0f}",
    }


def _plot(gains: Mapping[str, Sequence[float]]) -> str:
    figure, axes = figures.new_axes(
        "3D style, gain in EPS loss by timestep, mean of 3 seeds", "timestep", "gain over the base, %"
    )
    for color, (label, values) in zip(figures.COLORS[1:], gains.items(), strict=False):
        axes.plot(times(), values, color=color, linewidth=2, marker="o", label=label)
    axes.legend(frameon=False)
    return figures.save(figure, "evidence_read_through.png")


READ_THROUGH = Experiment(NAME, (repeats,), page_values, runner=measure)
