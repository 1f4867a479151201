"""11. From EPS to flow in a tenth of the steps of plain conversion, with all options combined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments import to_flow
from experiments.experiment import (
    Experiment,
    best_of_each,
    finals,
    on_seeds,
    spread,
    steps_text,
    steps_to,
    table,
)
from experiments.lab import train_recipe
from experiments.to_flow import BOTH, FAST_STEPS, PLAIN_STEPS, TARGET, DistanceRecorder
from experiments.trial import Outcome, Trial, save

NAME = "tenth"
STEPS = PLAIN_STEPS // 10
ALL_LAYERS = "plain, all layers"  # the best plain way

Sections = Mapping[str, Mapping[str, Any]]
SHORT: Sections = {"optimizer": {"warmup_steps": 1}}
PAIRED: Sections = {**SHORT, "objective": {"flow_pairing": "optimal_transport"}}
VARIANTS: Mapping[str, tuple[Sections, tuple[float, ...]]] = {  # changes to warm + teacher; rates searched
    "short warm-up": (SHORT, (4.5e-3,)),
    "short warm-up, optimal transport": (PAIRED, (4.5e-3,)),
}


def variant(label: str, rate: float) -> Trial:
    trial = to_flow.fast(label, rate, BOTH)
    sections = {name: dict(keys) for name, keys in trial.overrides.items()}
    for name, keys in VARIANTS[label][0].items():
        sections[name] = {**sections.get(name, {}), **keys}
    return replace(trial, experiment=NAME, steps=STEPS, validate_every=STEPS // 2, overrides=sections)


def sweep() -> list[Trial]:
    return [variant(label, rate) for label, (_, rates) in VARIANTS.items() for rate in rates]


def repeats() -> list[Trial]:
    return on_seeds(best_of_each(sweep()).values())


def run(trial: Trial, work: Path) -> Outcome:
    """Run a trial that generates images after the last step."""
    more = {"run": {"preview_every_steps": STEPS}}
    outcome = train_recipe(trial, work, more, recorder=DistanceRecorder(trial, work))
    save(trial, outcome)
    return outcome


def losses() -> dict[str, list[float]]:
    """Return the losses after STEPS: of the methods of `to_flow` in runs of 40 steps, and of the variants."""
    older = finals(to_flow.repeats())
    found = {
        f"{label}, step {STEPS} of {FAST_STEPS}": [dict(one.curve)[STEPS] for one in older[label]]
        for label in to_flow.METHODS
    }
    return {**found, **{label: [one.final for one in seeds] for label, seeds in finals(repeats()).items()}}


def rows() -> list[list[str]]:
    """Return, for each method, its loss after STEPS, and the steps of plain conversion to this loss."""
    older = finals(to_flow.repeats())
    table_rows: list[list[str]] = []
    for label, values in losses().items():
        same = (steps_text(steps_to(older[plain], values)) for plain in (TARGET, ALL_LAYERS))
        table_rows.append([label, str(len(values)), f"{spread(values):.3f}", *same])
    return table_rows


def page_values() -> dict[str, str]:
    older = finals(to_flow.repeats())
    header = ["method", "seeds", f"loss after {STEPS}", "steps of plain LoRA", "steps of plain, all layers"]
    ends = {name: spread(one.final for one in older[label]) for name, label in _PLAIN.items()}
    return {
        "table": table(header, rows()),
        "steps": str(STEPS),
        "plain_steps": str(PLAIN_STEPS),
        **{name: f"{end:.3f}" for name, end in ends.items()},
    }


_PLAIN = {"lora": TARGET, "all": ALL_LAYERS}

TENTH = Experiment(NAME, (sweep, repeats), page_values, runner=run, needs=("to_flow",))
