"""1, second part. Other ranks, and whether the principal reaches LoRA's loss in half the steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from experiments import figures, near_full
from experiments.experiment import (
    LENGTH,
    Experiment,
    best_of_each,
    finals,
    mean,
    on_seeds,
    rate_text,
    spread,
    steps_text,
    steps_to,
    table,
)
from experiments.near_full import framed
from experiments.trial import Outcome, Trial

NAME = "half_steps"
RATES = {  # rank 16 is in near_full
    ("plain", 4): (1e-3, 2e-3, 4e-3),
    ("principal", 4): (2e-4, 4e-4, 8e-4, 1.6e-3),
    ("plain", 8): (1e-3, 2e-3, 4e-3),
    ("principal", 8): (2e-4, 4e-4, 8e-4),
    ("plain", 32): (2.5e-4, 5e-4, 1e-3),
    ("principal", 32): (1e-4, 2e-4, 4e-4),
}
STEPS = 120


def ranks_sweep() -> list[Trial]:
    """Return the search of learning rates for each rank, with one seed."""
    return [
        replace(framed(frame, rank, rate), experiment=NAME)
        for (frame, rank), rates in RATES.items()
        for rate in rates
    ]


def other_ranks() -> list[Trial]:
    return on_seeds(best_of_each(ranks_sweep()).values())


def decaying(label: str, rate: float, steps: int, **model: Any) -> Trial:
    """Return a trial whose learning rate decays to zero, which gives the best final loss for its length."""
    return Trial(
        NAME,
        label,
        rate,
        steps=steps,
        validate_every=30,
        overrides={"model": model, "optimizer": {"schedule": "cosine"}},
    )


HALF = STEPS // 2
LONGER = 90
LONG = "plain, 120 steps"  # its final loss is the target for half the steps
PLAIN_MORE = "plain, all layers, 3x3 rank 32"
PLAIN_MORE_LONG = f"{PLAIN_MORE}, {STEPS} steps"
TEXT_LABELS = {  # names of values in the text, and their labels
    "aim": LONG,
    "plain": "plain",
    "principal": "principal",
    "dropout": "dropout 0.1",
    "layers": "all layers",
    "plain_layers": "plain, all layers",
    "more": "all layers, 3x3 rank 32",
    "plain_more": PLAIN_MORE,
    "plain_more_long": PLAIN_MORE_LONG,
    "longer": f"all layers, {LONGER} steps",
}


def decaying_sweep() -> list[Trial]:
    """Return plain LoRA with all steps, and variants that may reach its loss in half the steps."""
    high, low = (1e-3, 2e-3, 4e-3), (4e-4, 8e-4, 1.6e-3)
    everything = ["all"]
    trials = [decaying(LONG, rate, STEPS, frame="plain") for rate in high]
    trials += [decaying("plain", rate, HALF, frame="plain") for rate in high]
    trials += [decaying("principal", rate, HALF) for rate in low]
    trials += [decaying("equal lengths", rate, HALF, frame_norm=LENGTH) for rate in high]
    trials += [decaying("all layers", rate, HALF, layers=everything) for rate in low]
    trials += [decaying("3x3 rank 32", rate, HALF, conv_rank=32) for rate in (2e-4, *low[:2])]
    trials += [decaying("dropout 0.1", rate, HALF, dropout_probability=0.1) for rate in low[:2]]
    trials += [decaying("gradient", rate, HALF, frame="gradient") for rate in high]
    trials += [decaying("plain, all layers", rate, HALF, frame="plain", layers=everything) for rate in high]
    trials += [
        decaying("all layers, equal lengths", rate, HALF, layers=everything, frame_norm=LENGTH)
        for rate in high
    ]
    more: dict[str, Any] = {"layers": everything, "conv_rank": 32}
    trials += [decaying("all layers, 3x3 rank 32", rate, HALF, **more) for rate in (2e-4, *low[:2])]
    trials += [decaying(PLAIN_MORE, rate, HALF, frame="plain", **more) for rate in high]
    trials += [decaying(PLAIN_MORE_LONG, rate, STEPS, frame="plain", **more) for rate in high[1:]]
    return trials


def methods() -> dict[str, Trial]:
    """Return every method at its best rate, and "all layers" with more steps, to see how many it needs."""
    best = best_of_each(decaying_sweep())
    longer = f"all layers, {LONGER} steps"
    return {**best, longer: replace(best["all layers"], label=longer, steps=LONGER)}


def decaying_repeats() -> list[Trial]:
    return on_seeds(methods().values())


def of_rank(frame: str, rank: int) -> list[Outcome]:
    return finals(near_full.repeats() if rank == 16 else other_ranks())[f"{frame} r{rank}"]


def _rate(frame: str, rank: int) -> str:
    searched = near_full.sweep() if rank == 16 else ranks_sweep()
    return rate_text(best_of_each(searched)[f"{frame} r{rank}"], searched)


def rank_rows() -> list[list[str]]:
    """Return loss, share of the gain of full fine-tuning and steps to LoRA's loss, at each rank."""
    full = finals(near_full.repeats())["full"]
    rows: list[list[str]] = []
    for rank in (4, 8, 16, 32):
        plain, principal = of_rank("plain", rank), of_rank("principal", rank)
        steps = steps_to(principal, (outcome.final for outcome in plain))
        rows.append(
            [
                str(rank),
                _rate("plain", rank),
                _rate("principal", rank),
                *(f"{spread(outcome.final for outcome in outcomes)}" for outcomes in (plain, principal)),
                *(_percent(near_full.share_of_gain(outcomes, full)) for outcomes in (plain, principal)),
                steps_text(steps, of=STEPS),
            ]
        )
    return rows


def _percent(shares: list[float]) -> str:
    return f"{100 * mean(shares):.1f} %"


def changes() -> Mapping[str, list[Outcome]]:
    return finals(decaying_repeats())


def _name(label: str) -> str:
    return label.replace("plain", "LoRA")


def change_rows() -> list[list[str]]:
    outcomes, trials = changes(), methods()
    full = finals(near_full.repeats())["full"]
    rows: list[list[str]] = []
    for label, seeds in outcomes.items():
        steps = steps_to(seeds, (outcome.final for outcome in outcomes[LONG]))
        rows.append(
            [
                _name(label),
                rate_text(trials[label], decaying_sweep()),
                str(trials[label].steps),
                f"{spread(outcome.final for outcome in seeds)}",
                _percent(near_full.share_of_gain(seeds, full)),
                "" if label == LONG else steps_text(steps, of=STEPS),
            ]
        )
    return rows


def page_values() -> dict[str, str]:
    outcomes = changes()
    aim = mean(outcome.final for outcome in outcomes[LONG])
    plot = figures.dots(
        "evidence_half_steps.png",
        f"3D style, after {HALF} steps with a cosine schedule",
        {
            _name(label): [outcome.final for outcome in outcomes[label]]
            for label, trial in methods().items()
            if trial.steps == HALF
        },
        "validation loss",
        level=(f"LoRA after {STEPS} steps", aim),
    )
    return {
        "plot": plot,
        "half": str(HALF),
        "ratios": ", ".join(f"{row[-1]} at rank {row[0]}" for row in rank_rows()),
        **{
            name: f"{spread(outcome.final for outcome in outcomes[label])}"
            for name, label in TEXT_LABELS.items()
        },
        "enough": steps_text(
            steps_to(outcomes["all layers, 3x3 rank 32"], (outcome.final for outcome in outcomes[LONG])),
            of=STEPS,
        ),
        "longer_steps": str(LONGER),
        "steps": str(STEPS),
        "ranks": table(
            [
                "rank",
                "LoRA's rate",
                "principal's rate",
                "LoRA",
                "principal",
                "LoRA's share",
                "principal's share",
                "steps to LoRA's loss",
            ],
            rank_rows(),
        ),
        "changes": table(
            ["method", "rate", "steps", "validation loss", "share of full's gain", "steps to LoRA's loss"],
            change_rows(),
        ),
    }


HALF_STEPS = Experiment(
    NAME, (ranks_sweep, other_ranks, decaying_sweep, decaying_repeats), page_values, needs=("near_full",)
)
