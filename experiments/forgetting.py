"""10. Forgetting: the loss on flat images after tuning on 3D, against the gain on 3D."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from experiments import figures
from experiments.experiment import LENGTH, Experiment, on_seeds, spread, table
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
STEPS, EVERY = 60, 20
SHARE = 0.9  # of the gain of full fine-tuning with the same seed, at which forgetting is compared

Sections = Mapping[str, Mapping[str, Any]]
Point = tuple[float, float]  # gain on 3D, rise of the loss on flat images

FULL = "full"
EQUAL: Mapping[str, Any] = {"frame_norm": LENGTH}  # directions as long as those of plain LoRA
METHODS: Mapping[str, Mapping[str, Any]] = {  # the model section of each method at rank 16
    "LoRA": {"frame": "plain"},
    "principal": {"frame": "principal"},
    "principal, equal lengths": {"frame": "principal", **EQUAL},
    "minor, equal lengths": {"frame": "minor", **EQUAL},
    "svd-down": {"frame": "svd-down"},
}
RATES: Mapping[tuple[str, int], tuple[float, ...]] = {  # the first one has three seeds
    ("LoRA", 16): (2e-3, 1e-3),
    ("principal", 16): (4e-4, 2e-4),
    ("principal, equal lengths", 16): (1e-3,),
    ("minor, equal lengths", 16): (1e-3,),
    ("svd-down", 16): (2e-3, 1e-3),
    ("LoRA", 4): (4e-3,),
    ("principal", 4): (8e-4,),
    ("LoRA", 64): (7e-4,),
    ("principal", 64): (1.5e-4,),
}
FULL_RATES = (2e-4, 1e-4)


def full(rate: float) -> Trial:
    return Trial(NAME, FULL, rate, method="full", steps=STEPS, validate_every=EVERY)


def tuned(method: str, rank: int, rate: float) -> Trial:
    model = {**METHODS[method], "rank": rank}
    label = f"{method} r{rank}"
    return Trial(NAME, label, rate, steps=STEPS, validate_every=EVERY, overrides={"model": model})


def base() -> Trial:
    """Return the trial that only measures the loss of the base on the flat validation images."""
    return Trial(NAME, "base", 1e-4, pictures="flat", steps=1)


def main() -> list[Trial]:
    """Return each method of rank 16 at its rate, with seed 1."""
    return [full(FULL_RATES[0]), *(tuned(m, r, rates[0]) for (m, r), rates in RATES.items() if r == 16)]


def ranks() -> list[Trial]:
    """Return the other ranks, with one seed."""
    return [tuned(m, r, rates[0]) for (m, r), rates in RATES.items() if r != 16]


def rates() -> list[Trial]:
    """Return the methods at more rates, with one seed."""
    others = [tuned(m, r, rate) for (m, r), rates in RATES.items() for rate in rates[1:]]
    return [*(full(rate) for rate in FULL_RATES[1:]), *others]


def everything() -> list[Trial]:
    return [base(), *on_seeds(main()), *ranks(), *rates()]


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


def of_seeds(trial: Trial) -> Iterator[tuple[int, Outcome]]:
    """Load the outcomes of a trial that are finished, by seed."""
    for one in on_seeds([trial]):
        if one.done:
            yield one.seed, load(one)


def equal_gain(trial: Trial) -> list[float | None]:
    """Return, for each seed, the rise at SHARE of the gain of full fine-tuning."""
    reference = {seed: outcome.before - outcome.final for seed, outcome in of_seeds(main()[0])}
    return [
        rise_at(points(outcome), SHARE * reference[seed])
        for seed, outcome in of_seeds(trial)
        if seed in reference
    ]


def equal_gain_text(rises: Sequence[float | None]) -> str:
    reached = [rise for rise in rises if rise is not None]
    if len(reached) == len(rises):
        return f"{spread(reached)}"
    return f"in {len(reached)} of {len(rises)} seeds" if reached else "not reached"


def rows(trials: Sequence[Trial]) -> list[list[str]]:
    table_rows: list[list[str]] = []
    for trial in trials:
        ends = [points(outcome)[-1] for _, outcome in of_seeds(trial)]
        gain, rise = (spread(values) for values in zip(*ends, strict=True))
        table_rows.append(
            [trial.label, f"{trial.rate:g}", f"{gain}", f"{rise}", equal_gain_text(equal_gain(trial))]
        )
    return table_rows


HEADER = ("method", "rate", "gain on 3D", "rise on flat", f"rise at {SHARE:.0%} of full's gain")


def mean_points(trial: Trial) -> list[Point]:
    """Return the mean curve over the finished seeds."""
    curves = [points(outcome) for _, outcome in of_seeds(trial)]
    return [
        (spread(gain for gain, _ in at).mean, spread(rise for _, rise in at).mean)
        for at in zip(*curves, strict=True)
    ]


def groups(trials: Sequence[Trial]) -> dict[str, list[list[Point]]]:
    """Return the curves of each label, one per rate."""
    curves: dict[str, list[list[Point]]] = {}
    for trial in trials:
        curves.setdefault(trial.label, []).append(mean_points(trial))
    return curves


def plot(name: str, title: str, trials: Sequence[Trial]) -> str:
    return figures.paths(
        name, title, groups(trials), "gain: fall of the loss on 3D images", "rise of the loss on flat images"
    )


def page_values() -> dict[str, str]:
    other = [one for one in (*main(), *ranks()) if one.label.startswith(("full", "LoRA", "principal r"))]
    return {
        "frames_plot": plot(
            "evidence_forgetting.png",
            f"Rank 16, along {STEPS} steps, at one or two constant rates",
            [*main(), *rates()],
        ),
        "ranks_plot": plot("evidence_forgetting_ranks.png", f"Ranks, along {STEPS} steps", other),
        "frames": table(HEADER, rows(main())),
        "others": table(HEADER, rows([*ranks(), *rates()])),
        "flat_before": f"{load(base()).final:.4f}",
        "steps": str(STEPS),
        "share": f"{SHARE:.0%}",
    }


FORGETTING = Experiment(NAME, (everything,), page_values, runner=run)
