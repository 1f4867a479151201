"""15. Refresh: does a change of any rank reach full fine-tuning's loss at rank 16? 3D style, UNet only."""

from __future__ import annotations

from experiments import figures, near_full
from experiments.experiment import SEEDS, Experiment, best_of_each, finals, on_seeds, rate_text, spread, table
from experiments.trial import Outcome, Trial

NAME = "refresh"
# frame and steps between refreshes, and the rates searched
RATES = {
    ("plain", 20): (1e-3, 2e-3),
    ("plain", 50): (1e-3, 2e-3),
    ("svd-down", 20): (1e-3, 2e-3),
    ("principal", 20): (2e-4, 4e-4),
}


def refreshed(frame: str, every: int, rate: float) -> Trial:
    model = {"rank": 16, "frame": frame, "refresh_every_steps": every}
    return Trial(NAME, f"{frame} r16, every {every}", rate, overrides={"model": model})


def sweep() -> list[Trial]:
    return [refreshed(frame, every, rate) for (frame, every), rates in RATES.items() for rate in rates]


def repeats() -> list[Trial]:
    """Return the best rates with three seeds, except of the principal, whose directions hardly move."""
    chosen = best_of_each(sweep())
    return on_seeds([trial for trial in chosen.values() if not trial.label.startswith("principal")], SEEDS)


def page_values() -> dict[str, str]:
    once = finals(near_full.repeats())
    chosen = {**near_full.chosen(), **best_of_each(sweep())}
    refreshed_once = finals(best_of_each(sweep()).values())
    outcomes: dict[str, list[Outcome]] = {**once, **refreshed_once, **finals(repeats())}
    searched = [*near_full.sweep(), *sweep()]
    rows: list[list[str]] = []
    for label, found in outcomes.items():
        shares = near_full.share_of_gain(found, once["full"][: len(found)])
        rows.append(
            [
                label.replace("plain", "LoRA"),
                rate_text(chosen[label], searched),
                str(len(found)),
                f"{spread(outcome.final for outcome in found)}",
                f"{spread(100 * share for share in shares):.1f} %",
            ]
        )
    plot = figures.curves(
        "evidence_refresh.png",
        "3D style, with and without refresh, each at its best constant rate, 3 seeds",
        outcomes,
        top=0.066,
    )
    return {
        "plot": plot,
        "table": table(["method", "rate", "seeds", "validation loss", "share of full's gain"], rows),
    }


REFRESH = Experiment(NAME, (sweep, repeats), page_values, needs=("near_full",))
