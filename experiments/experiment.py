"""An experiment: stages of trials and a section of the page. Helpers that summarize outcomes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.trial import Outcome, Trial, load

Stage = Callable[[], list[Trial]]  # later stages read the results of earlier ones
SEEDS = (1, 2, 3)
FRAME_RATES = {  # learning rates in the comparison of frames
    "principal": (2.5e-4, 5e-4, 1e-3),
    "minor": (1e-3, 2e-3),
    "gradient": (2.5e-4, 5e-4, 1e-3),
    "data": (2.5e-4, 5e-4, 1e-3),
}
FRAMES = tuple(FRAME_RATES)
LENGTH = 0.577  # length of each direction in this comparison: 1/sqrt(3), as a row of plain LoRA


@dataclass(frozen=True)
class Experiment:
    """An experiment: stages of trials, and the values for its section of the page."""

    name: str
    stages: tuple[Stage, ...]
    values: Callable[[], Mapping[str, str]]  # values for the braces in its text, computed from the results
    prepare: Callable[[Path], None] | None = None  # writes files for its trials to the work folder
    runner: Callable[[Trial, Path], Outcome] | None = None  # used instead of lab.run_trial
    needs: tuple[str, ...] = ()  # experiments whose results its trials or its text use

    def trials(self) -> list[Trial]:
        """Return the trials of all finished stages and of the first unfinished one."""
        trials: list[Trial] = []
        for stage in self.stages:
            trials += stage()
            if not all(trial.done for trial in trials):
                break
        return trials

    @property
    def done(self) -> bool:
        return all(all(trial.done for trial in stage()) for stage in self.stages)

    def state(self) -> str:
        trials = self.trials()
        count = sum(trial.done for trial in trials)
        return f"{self.name:14} {count} of {len(trials)} runs" + ("" if self.done else ", unfinished")


def best(trials: Iterable[Trial]) -> Trial:
    """Return the trial with the lowest final validation loss."""
    return min(trials, key=lambda trial: load(trial).final)


def best_of_each(trials: Iterable[Trial]) -> dict[str, Trial]:
    """Return the best trial of each label, in the order of first appearance."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.label, []).append(trial)
    return {label: best(group) for label, group in groups.items()}


def on_seeds(trials: Iterable[Trial], seeds: Sequence[int] = SEEDS) -> list[Trial]:
    return [replace(trial, seed=seed) for trial in trials for seed in seeds]


@dataclass(frozen=True)
class Spread:
    """The mean and the sample standard deviation over seeds; for one seed, its value."""

    mean: float
    deviation: float
    values: tuple[float, ...]

    def __format__(self, spec: str) -> str:
        spec = spec or ".4f"
        if len(self.values) == 1:
            return f"{self.mean:{spec}}"
        return f"{self.mean:{spec}} ± {self.deviation:{spec.lstrip('+')}}"


def spread(values: Iterable[float]) -> Spread:
    values = tuple(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return Spread(statistics.fmean(values), deviation, values)


def finals(trials: Iterable[Trial]) -> Mapping[str, list[Outcome]]:
    """Load the outcomes of each label, ordered by seed."""
    outcomes: dict[str, list[Outcome]] = {}
    for trial in trials:
        outcomes.setdefault(trial.label, []).append(load(trial))
    return outcomes


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def steps_to(outcomes: Iterable[Outcome], losses: Iterable[float]) -> list[float | None]:
    """Return, for each seed, the steps until an outcome reaches a loss; None if it never does."""
    return [outcome.steps_until(loss) for outcome, loss in zip(outcomes, losses, strict=False)]


def steps_text(steps: Sequence[float | None], *, of: int | None = None) -> str:
    """Return mean and deviation of steps, as a share of `of` if given; or how many seeds reached the loss."""
    reached = [count / (of or 1) for count in steps if count is not None]
    if len(reached) == len(steps):
        return f"{spread(reached):{'.0f' if of is None else '.2f'}}"
    return f"in {len(reached)} of {len(steps)} seeds" if reached else "never"


def rate_text(trial: Trial, searched: Iterable[Trial]) -> str:
    """Return the rate, with a star if it is the lowest or the highest of those searched for its label."""
    rates = sorted(one.rate for one in searched if one.label == trial.label and one.rate is not None)
    assert trial.rate is not None
    return f"{trial.rate:g}" + ("*" if trial.rate in (*rates[:1], *rates[-1:]) else "")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a markdown table; all columns except the first are right-aligned."""
    lines = [
        f"| {' | '.join(header)} |",
        f"| --- |{' ---: |' * (len(header) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines)
