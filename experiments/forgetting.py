"""10. Forgetting: the loss on flat images after tuning on 3D, against the gain on 3D."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from experiments import figures
from experiments.experiment import LENGTH, SEEDS, Experiment, spread, table
from experiments.lab import Recorder, recipe_of, train_full, train_recipe, validation_loss
from experiments.trial import Outcome, Trial, load, save
from spectune.model.offload import StagedModel
from spectune.training import validation
from spectune.training.callbacks import Callbacks
from spectune.training.data.buckets import training_buckets
from spectune.training.data.folders import scan_validation
from spectune.training.denoiser import Denoiser, encode_captions
from spectune.training.setup import assemble

NAME = "forgetting"
LONG, STEPS, EVERY = 60, 40, 20  # the first seed runs longer; all seeds are compared after STEPS
GAIN = 0.033  # at which forgetting is compared: nine tenths of the gain of full fine-tuning in near_full

Point = tuple[float, float]  # gain on 3D, rise of the loss on flat images

FULL = "full"
EQUAL: Mapping[str, Any] = {"frame_norm": LENGTH}  # directions as long as those of plain LoRA
METHODS: Mapping[str, tuple[Mapping[str, Any], float]] = {  # the model section and the rate
    FULL: ({}, 2e-4),
    "LoRA r16": ({"frame": "plain"}, 2e-3),
    "principal r16": ({"frame": "principal"}, 4e-4),
    "minor r16, equal lengths": ({"frame": "minor", **EQUAL}, 1e-3),
    "svd-down r16": ({"frame": "svd-down"}, 2e-3),
    "LoRA r4": ({"frame": "plain", "rank": 4}, 4e-3),
    "principal r4": ({"frame": "principal", "rank": 4}, 8e-4),
    "LoRA r64": ({"frame": "plain", "rank": 64}, 5e-4),
    "principal r64": ({"frame": "principal", "rank": 64}, 1e-4),
    "LoRA r16, refreshed every 20": ({"frame": "plain", "refresh_every_steps": 20}, 2e-3),
}
SHOWN = (FULL, "LoRA r16", "principal r16", "minor r16, equal lengths", "LoRA r64", "principal r64")
TWO_SEEDS = ("principal r4", "LoRA r64", "principal r64", "LoRA r16, refreshed every 20")


def trial(label: str, seed: int) -> Trial:
    model, rate = METHODS[label]
    return Trial(
        NAME,
        label,
        rate,
        seed=seed,
        method="full" if label == FULL else "recipe",
        steps=LONG if seed == 1 else STEPS,
        validate_every=EVERY,
        overrides={} if label == FULL else {"model": {"rank": 16, **model}},
    )


def base() -> Trial:
    """Return the trial that only measures the loss of the base on the flat validation images."""
    return Trial(NAME, "base", 1e-4, pictures="flat", steps=1)


def tuned() -> dict[str, list[Trial]]:
    seeds = {label: SEEDS[:2] if label in TWO_SEEDS else SEEDS for label in METHODS}
    return {label: [trial(label, seed) for seed in seeds[label]] for label in METHODS}


def everything() -> list[Trial]:
    return [base(), *(one for trials in tuned().values() for one in trials)]


class FlatRecorder(Recorder):
    """A recorder that also measures the loss on the flat validation images."""

    def __init__(self, trial: Trial, work: Path) -> None:
        super().__init__()
        self.settings = recipe_of(_on_flat(trial), work)
        self.images: list[validation.ValidationImages] = []
        self.text: dict[str, Any] = {}
        self.flat: list[tuple[int, float]] = []

    def on_preview(self, step: int, model: StagedModel) -> None:
        if not self.images:
            data = self.settings.data
            scan = scan_validation(data)
            assert scan is not None
            self.images = validation.encode_validation(model.sdxl, scan, training_buckets(data)[0])
            self.text = encode_captions(model.sdxl, {one for group in self.images for one in group.captions})
        denoiser = Denoiser(model.sdxl, trains_text=False)
        denoiser.text = self.text
        run = self.settings.run
        loss = validation.validation_loss(
            denoiser, self.images, model.sdxl.prediction, times=run.validation_times, batch=run.batch
        )
        self.flat.append((step, loss))

    def extra(self) -> dict[str, Any]:
        return {"flat": self.flat}


def _on_flat(trial: Trial) -> Trial:
    return Trial(NAME, trial.label, trial.rate, pictures="flat", steps=trial.steps)


def run(trial: Trial, work: Path) -> Outcome:
    """Run a trial that validates on both styles."""
    if trial.label == "base":
        loss = validation_loss(assemble(recipe_of(trial, work), Accelerator(), Callbacks()))
        outcome = Outcome(((0, loss),), 0)
    elif trial.method == "full":
        recorder = FlatRecorder(trial, work)
        outcome = train_full(trial, work, recorder=recorder, preview_every=trial.validate_every)
    else:
        more = {"run": {"preview_every_steps": trial.validate_every}}
        outcome = train_recipe(trial, work, more, recorder=FlatRecorder(trial, work))
    assert trial.label == "base" or len(outcome.extra["flat"]) == len(outcome.curve) - 1
    save(trial, outcome)
    return outcome


def points(outcome: Outcome) -> list[Point]:
    """Return gain on 3D and rise of the loss on flat images, from the base to the last step."""
    flat = dict(outcome.extra["flat"])
    before = load(base()).final
    later = [(outcome.before - loss, flat[step] - before) for step, loss in outcome.curve[1:]]
    return [(0.0, 0.0), *later]


def rise_at(curve: Sequence[Point], gain: float) -> float | None:
    """Return the rise where the piecewise linear curve first reaches a gain; None if it never does."""
    for (last_gain, last_rise), (next_gain, next_rise) in pairwise(curve):
        if next_gain >= gain:
            share = (gain - last_gain) / (next_gain - last_gain)
            return last_rise + share * (next_rise - last_rise)
    return None


def at_equal_gain(curves: Sequence[Sequence[Point]]) -> str:
    """Return the rise at GAIN, over the seeds."""
    reached = [rise for curve in curves if (rise := rise_at(curve, GAIN)) is not None]
    if len(reached) < len(curves):
        return f"in {len(reached)} of {len(curves)} seeds"
    return f"{spread(reached)}"


def rows() -> list[list[str]]:
    table_rows: list[list[str]] = []
    for label, trials in tuned().items():
        curves = [points(load(one)) for one in trials]
        gain, rise = (spread(values) for values in zip(*(c[STEPS // EVERY] for c in curves), strict=True))
        table_rows.append(
            [label, f"{trials[0].rate:g}", str(len(trials)), f"{gain}", f"{rise}", at_equal_gain(curves)]
        )
    return table_rows


def page_values() -> dict[str, str]:
    after = [f"gain after {STEPS}", f"rise after {STEPS}"]
    header = ["method", "rate", "seeds", *after, f"rise at gain {GAIN:g}"]
    plot = figures.paths(
        "evidence_forgetting.png",
        f"Tuned on 3D, measured every {EVERY} steps; dashed: the other seeds",
        {label: [points(load(one))[1:] for one in tuned()[label]] for label in SHOWN},
        "gain: fall of the loss on 3D images",
        "forgetting: rise of the loss on flat images",
    )
    first = {label: points(load(trials[0])) for label, trials in tuned().items()}
    return {
        "plot": plot,
        "table": table(header, rows()),
        "before": f"{load(base()).final:.4f}",
        "gain": f"{GAIN:g}",
        "steps": str(STEPS),
        "long": str(LONG),
        **{
            f"{name}_{step}": f"{first[label][step // EVERY][1]:.4f}"
            for name, label in (("full", FULL), ("lora", "LoRA r16"), ("principal", "principal r16"))
            for step in (EVERY, LONG)
        },
    }


FORGETTING = Experiment(NAME, (everything,), page_values, runner=run)
