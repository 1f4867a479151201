"""11. From EPS to flow in a tenth of the steps of plain conversion, with all options combined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments import to_flow
from experiments.experiment import (
    Experiment,
    best_of_each,
    finals,
    on_seeds,
    rate_text,
    spread,
    steps_text,
    steps_to,
    table,
)
from experiments.lab import train_recipe
from experiments.to_flow import BOTH, PLAIN_STEPS, TARGET, DistanceRecorder
from experiments.trial import Outcome, Trial, save

NAME = "tenth"
STEPS = PLAIN_STEPS // 10
ALL_LAYERS = "plain, all layers"  # the best plain way
BASIS = "warm + teacher"

Sections = Mapping[str, Mapping[str, Any]]
SHORT_WARMUP: Sections = {"optimizer": {"warmup_steps": 1}}
VARIANTS: Mapping[str, tuple[Sections, tuple[float, ...]]] = {  # changes to BASIS, and the rates searched
    BASIS: ({}, (4.5e-3,)),
    "short warm-up": (SHORT_WARMUP, (4.5e-3,)),
    "short warm-up, rank 64": ({**SHORT_WARMUP, "model": {"rank": 64}}, (2e-3,)),
}
REPEATED = ("short warm-up",)


def variant(label: str, rate: float) -> Trial:
    trial = to_flow.fast(label, rate, BOTH)
    sections = {name: dict(keys) for name, keys in trial.overrides.items()}
    for name, keys in VARIANTS[label][0].items():
        sections[name] = {**sections.get(name, {}), **keys}
    return replace(trial, experiment=NAME, steps=STEPS, validate_every=STEPS // 2, overrides=sections)


def sweep() -> list[Trial]:
    return [variant(label, rate) for label, (_, rates) in VARIANTS.items() for rate in rates]


def repeats() -> list[Trial]:
    chosen = best_of_each(sweep())
    return on_seeds([chosen[label] for label in REPEATED])


def run(trial: Trial, work: Path) -> Outcome:
    """Run a trial that generates images after the last step."""
    more = {"run": {"preview_every_steps": STEPS}}
    outcome = train_recipe(trial, work, more, recorder=DistanceRecorder(trial, work))
    save(trial, outcome)
    return outcome


def outcomes() -> dict[str, list[Outcome]]:
    """Return the outcomes of each variant at its best rate: of three seeds, or of one."""
    single = finals(best_of_each(sweep()).values())
    return {**single, **finals(repeats())}


def rows(plain: Sequence[Outcome]) -> list[list[str]]:
    """Return a row for each variant; `plain` are the outcomes of the best plain way, by seed."""
    chosen = best_of_each(sweep())
    table_rows: list[list[str]] = []
    for label, seeds in outcomes().items():
        same = steps_to(plain, (outcome.final for outcome in seeds))
        table_rows.append(
            [
                label,
                rate_text(chosen[label], sweep()),
                f"{spread(outcome.final for outcome in seeds):.3f}",
                to_flow.distance_text(seeds),
                steps_text(same[: len(seeds)]),
            ]
        )
    return table_rows


def page_values() -> dict[str, str]:
    older = finals(to_flow.repeats())
    plain, lora = older[ALL_LAYERS], older[TARGET]
    best = outcomes()[REPEATED[0]]
    header = [
        "method",
        "rate",
        f"loss after {STEPS}",
        "image distance",
        f"steps of *{ALL_LAYERS}* to this loss",
    ]
    return {
        "table": table(header, rows(plain)),
        "steps": str(STEPS),
        "plain_steps": str(PLAIN_STEPS),
        "lora": f"{spread(outcome.final for outcome in lora):.3f}",
        "plain": f"{spread(outcome.final for outcome in plain):.3f}",
        "best": f"{spread(outcome.final for outcome in best):.3f}",
        "same_lora": steps_text(steps_to(lora, (outcome.final for outcome in best))),
        "same_plain": steps_text(steps_to(plain, (outcome.final for outcome in best))),
        "before": f"{spread(outcome.before for outcome in best):.3f}",
    }


TENTH = Experiment(NAME, (sweep, repeats), page_values, runner=run, needs=("to_flow",))
