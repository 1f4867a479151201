"""13. The main comparison on a base of twice the width, where rank 16 is half as large a share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from experiments import figures
from experiments.experiment import Experiment, best_of_each, finals, on_seeds, rate_text, spread, table
from experiments.near_full import framed, full, share_of_gain
from experiments.trial import Trial
from spectune.errors import InputError

NAME = "wide"
BASE = "wide"  # the file wide.safetensors in the work folder
FULL_RATES = (5e-5, 1e-4, 2e-4)
RATES = {
    ("plain", 16): (5e-4, 1e-3, 2e-3),
    ("principal", 16): (1e-4, 2e-4, 4e-4),
    ("plain", 4): (1e-3, 2e-3, 4e-3),
    ("principal", 4): (4e-4, 8e-4),
}


def sweep() -> list[Trial]:
    trials = [full(rate) for rate in FULL_RATES]
    trials += [framed(frame, rank, rate) for (frame, rank), rates in RATES.items() for rate in rates]
    return [replace(trial, experiment=NAME, base=BASE) for trial in trials]


def repeats() -> list[Trial]:
    return on_seeds(best_of_each(sweep()).values())


def prepare(work: Path) -> None:
    """Check that the wide base exists. Training it takes hours and the archives of both styles."""
    file = work / f"{BASE}.safetensors"
    if not file.is_file():
        raise InputError(
            f"{file} is missing",
            hint="run `python demo/train_base.py --width 2 ...` and copy its base.safetensors there",
        )


def page_values() -> dict[str, str]:
    outcomes = finals(repeats())
    chosen = best_of_each(sweep())
    rows = [
        [
            label.replace("plain", "LoRA"),
            rate_text(chosen[label], sweep()),
            f"{spread(outcome.final for outcome in seeds)}",
            f"{100 * spread(share_of_gain(seeds, outcomes['full'])).mean:.1f} %",
        ]
        for label, seeds in outcomes.items()
    ]
    plot = figures.curves("evidence_wide.png", "3D style, a base of twice the width", outcomes)
    header = ["method", "rate", "validation loss", "share of full's gain"]
    return {"plot": plot, "table": table(header, rows)}


WIDE = Experiment(NAME, (sweep, repeats), page_values, prepare=prepare)
