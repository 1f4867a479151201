"""What an experiment is: stages of trials, and a section of the page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.trial import Outcome, Trial, load

Stage = Callable[[], list[Trial]]  # later stages read what earlier ones found
SEEDS = (1, 2, 3)
FRAME_RATES = {  # where frames are compared
    "principal": (2.5e-4, 5e-4, 1e-3),
    "minor": (1e-3, 2e-3),
    "gradient": (2.5e-4, 5e-4, 1e-3),
    "data": (2.5e-4, 5e-4, 1e-3),
}
FRAMES = tuple(FRAME_RATES)
LENGTH = 0.577  # of each direction there: 1/sqrt(3), that of a row of plain LoRA


@dataclass(frozen=True)
class Experiment:
    name: str
    stages: tuple[Stage, ...]
    figures: Callable[[], Mapping[str, str]]  # what stands in braces in its text, from the results
    prepare: Callable[[Path], None] | None = None  # files that its trials need, made in the work folder
    runner: Callable[[Trial, Path], Outcome] | None = None  # instead of lab.run_trial
    needs: tuple[str, ...] = ()  # experiments whose results its trials or its text take up

    def trials(self) -> list[Trial]:
        """All trials that are known so far."""
        found: list[Trial] = []
        for stage in self.stages:
            found += stage()
            if not all(trial.done for trial in found):
                break
        return found

    @property
    def done(self) -> bool:
        return all(all(trial.done for trial in stage()) for stage in self.stages)

    def state(self) -> str:
        known = self.trials()
        count = sum(trial.done for trial in known)
        return f"{self.name:14} {count} of {len(known)} runs" + ("" if self.done else ", unfinished")


def best(trials: Iterable[Trial]) -> Trial:
    """The trial that ends at the lowest held-out loss."""
    return min(trials, key=lambda trial: load(trial).final)


def best_of_each(trials: Iterable[Trial]) -> dict[str, Trial]:
    """The best trial of each label, in the order of their first appearance."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.label, []).append(trial)
    return {label: best(group) for label, group in groups.items()}


def on_seeds(trials: Iterable[Trial], seeds: Sequence[int] = SEEDS) -> list[Trial]:
    return [replace(trial, seed=seed) for trial in trials for seed in seeds]


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; of one seed, its value."""

    mean: float
    deviation: float
    values: tuple[float, ...]

    def __format__(self, spec: str) -> str:
        spec = spec or ".4f"
        if len(self.values) == 1:
            return f"{self.mean:{spec}}"
        return f"{self.mean:{spec}} ± {self.deviation:{spec.lstrip('+')}}"


def spread(values: Iterable[float]) -> Spread:
    found = tuple(values)
    deviation = statistics.stdev(found) if len(found) > 1 else 0.0
    return Spread(statistics.fmean(found), deviation, found)


def finals(trials: Iterable[Trial]) -> Mapping[str, list[Outcome]]:
    """Outcomes by label, seeds in order."""
    found: dict[str, list[Outcome]] = {}
    for trial in trials:
        found.setdefault(trial.label, []).append(load(trial))
    return found


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def steps_to(outcomes: Iterable[Outcome], losses: Iterable[float]) -> list[float | None]:
    """Steps of each outcome until its loss, seed by seed; None where it never falls that low."""
    return [outcome.steps_until(loss) for outcome, loss in zip(outcomes, losses, strict=False)]


def told_steps(steps: Sequence[float | None], *, of: int | None = None) -> str:
    """Mean and deviation, of steps or as a share `of` a number of them, or in how many seeds it got there."""
    reached = [it / (of or 1) for it in steps if it is not None]
    if len(reached) == len(steps):
        return f"{spread(reached):{'.0f' if of is None else '.2f'}}"
    return f"in {len(reached)} of {len(steps)} seeds" if reached else "never"


def told_rate(trial: Trial, searched: Iterable[Trial]) -> str:
    """The rate, with a star where it is the lowest or the highest that the label was searched at."""
    rates = sorted(it.rate for it in searched if it.label == trial.label and it.rate is not None)
    assert trial.rate is not None
    return f"{trial.rate:g}" + ("*" if trial.rate in (*rates[:1], *rates[-1:]) else "")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; all columns but the first are right-aligned."""
    lines = [
        f"| {' | '.join(header)} |",
        f"| --- |{' ---: |' * (len(header) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines)
