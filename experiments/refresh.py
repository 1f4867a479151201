"""15. Refresh: does a change of any rank reach full fine-tuning's loss at rank 16? 3D style, UNet only."""

from __future__ import annotations

from experiments import figures, near_full
from experiments.experiment import SEEDS, Experiment, best_of_each, finals, on_seeds, rate_text, spread, table
from experiments.trial import Outcome, Trial

NAME = "refresh"
EVERY = (20, 50)
RATES = {"plain": (1e-3, 2e-3), "principal": (2e-4, 4e-4)}


def refreshed(frame: str, every: int, rate: float) -> Trial:
    model = {"rank": 16, "frame": frame, "refresh_every_steps": every}
    return Trial(NAME, f"{frame} r16, every {every}", rate, overrides={"model": model})


def sweep() -> list[Trial]:
    return [
        refreshed(frame, every, rate) for frame, rates in RATES.items() for every in EVERY for rate in rates
    ]


def repeats() -> list[Trial]:
    return on_seeds(best_of_each(sweep()).values(), SEEDS)


def page_values() -> dict[str, str]:
    once = finals(near_full.repeats())
    outcomes: dict[str, list[Outcome]] = {**once, **finals(repeats())}
    chosen = {**near_full.chosen(), **best_of_each(sweep())}
    searched = [*near_full.sweep(), *sweep()]
    rows: list[list[str]] = []
    for label, found in outcomes.items():
        shares = spread(near_full.share_of_gain(found, once["full"]))
        rows.append(
            [
                label.replace("plain", "LoRA"),
                rate_text(chosen[label], searched),
                f"{spread(outcome.final for outcome in found)}",
                f"{100 * shares.mean:.1f} ± {100 * shares.deviation:.1f} %",
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
        "table": table(["method", "rate", "validation loss", "share of full's gain"], rows),
    }


REFRESH = Experiment(NAME, (sweep, repeats), page_values, needs=("near_full",))
