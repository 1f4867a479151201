"""1. How close do low ranks come to full fine-tuning, and how fast? 3D style, UNet only."""

from __future__ import annotations

from collections.abc import Sequence

from experiments import figures
from experiments.experiment import SEEDS, Experiment, best_of_each, finals, on_seeds, rate_text, spread, table
from experiments.trial import Outcome, Trial

NAME = "near_full"
FULL_RATES = (1e-4, 2e-4, 4e-4)
PLAIN_RATES = (5e-4, 1e-3, 2e-3)
PRINCIPAL_RATES = (1e-4, 2e-4, 4e-4, 8e-4)


def full(rate: float) -> Trial:
    return Trial(NAME, "full", rate, method="full")


def framed(frame: str, rank: int, rate: float) -> Trial:
    return Trial(NAME, f"{frame} r{rank}", rate, overrides={"model": {"frame": frame, "rank": rank}})


def sweep() -> list[Trial]:
    """Return the search of learning rates for each method at rank 16, with one seed."""
    return [
        *(full(rate) for rate in FULL_RATES),
        *(framed("plain", 16, rate) for rate in PLAIN_RATES),
        *(framed("principal", 16, rate) for rate in PRINCIPAL_RATES),
    ]


def chosen() -> dict[str, Trial]:
    """Return each method at its best rate."""
    return best_of_each(sweep())


def repeats() -> list[Trial]:
    return on_seeds(chosen().values(), SEEDS)


def share_of_gain(outcomes: Sequence[Outcome], reference: Sequence[Outcome]) -> list[float]:
    """Return the share of the gain of full fine-tuning with the same seed, for each seed."""
    return [
        (one.before - one.final) / (other.before - other.final)
        for one, other in zip(outcomes, reference, strict=True)
    ]


def page_values() -> dict[str, str]:
    outcomes = finals(repeats())
    names = {"full": "full fine-tuning", "plain r16": "LoRA r16", "principal r16": "principal r16"}
    plot = figures.curves(
        "evidence_near_full.png",
        "3D style, each method at its best constant rate, 3 seeds",
        {names[label]: rows for label, rows in outcomes.items()},
        top=0.066,
    )
    return {"plot": plot, "table": _main_table()}


def _main_table() -> str:
    by_label = finals(repeats())
    rows: list[list[str]] = []
    for label, outcomes in by_label.items():
        shares = spread(share_of_gain(outcomes, by_label["full"]))
        rows.append(
            [
                label.replace("plain", "LoRA"),
                rate_text(chosen()[label], sweep()),
                f"{outcomes[0].trained_parameters / 1e6:.2f} M",
                f"{spread(outcome.final for outcome in outcomes)}",
                f"{100 * shares.mean:.1f} ± {100 * shares.deviation:.1f} %",
            ]
        )
    return table(["method", "rate", "trained", "validation loss", "share of full's gain"], rows)


NEAR_FULL = Experiment(NAME, (sweep, repeats), page_values)
