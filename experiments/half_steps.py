"""1, second part. Other ranks, and whether the principal reaches plain LoRA's loss in half of its steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments import figures, near_full
from experiments.experiment import (
    LENGTH,
    SEEDS,
    Experiment,
    best_of_each,
    finals,
    mean,
    on_seeds,
    spread,
    steps_to,
    table,
    told_rate,
    told_steps,
)
from experiments.near_full import chosen, framed
from experiments.trial import Outcome, Trial, load

NAME = "half_steps"
REPEATED_RANKS = (4, 32)
RANKS = (4, 8, 32)  # beside 16, where learning rates are searched
STEPS = 120


def ranks_sweep() -> list[Trial]:
    """Lower ranks at the rate of rank 16 and at twice that, higher ranks at it and at half."""
    found: list[Trial] = []
    for rank in RANKS:
        for frame in ("plain", "principal"):
            rate = chosen()[f"{frame} r16"].rate
            assert rate is not None
            for times in (1, 2) if rank < 16 else (0.5, 1):
                found.append(replace(framed(frame, rank, rate * times), experiment=NAME))
    return found


def other_ranks() -> list[Trial]:
    """Three seeds of the lowest and the highest rank."""
    chosen = best_of_each(ranks_sweep())
    labels = [f"{frame} r{rank}" for rank in REPEATED_RANKS for frame in ("plain", "principal")]
    return on_seeds((chosen[label] for label in labels), SEEDS)


def decaying(label: str, rate: float, steps: int, **model: Any) -> Trial:
    """A run whose learning rate falls to nothing, so that its end is as good as its length allows."""
    return Trial(
        NAME,
        label,
        rate,
        steps=steps,
        validate_every=30,
        overrides={"model": model, "optimizer": {"schedule": "cosine"}},
    )


HALF = STEPS // 2
LONG = "plain, 120 steps"  # what is to be reached in half of its steps


def decaying_sweep() -> list[Trial]:
    """Plain LoRA over all steps, and what may reach its loss in half: changes to the principal."""
    found = [decaying(LONG, rate, STEPS, frame="plain") for rate in (1e-3, 2e-3)]
    found += [decaying("plain", rate, HALF, frame="plain") for rate in (1e-3, 2e-3)]
    found += [decaying("principal", rate, HALF) for rate in (4e-4, 8e-4)]
    found += [decaying("equal lengths", rate, HALF, frame_norm=LENGTH) for rate in (1e-3, 2e-3)]
    found += [decaying("all layers", rate, HALF, layers=["all"]) for rate in (4e-4, 8e-4)]
    found += [decaying("3x3 rank 32", rate, HALF, conv_rank=32) for rate in (4e-4, 8e-4)]
    found += [decaying("dropout 0.1", 4e-4, HALF, dropout_probability=0.1)]
    found += [decaying("gradient", rate, HALF, frame="gradient") for rate in (1e-3, 2e-3)]
    found += [decaying("plain, all layers", 2e-3, HALF, frame="plain", layers=["all"])]
    found += [decaying("all layers, equal lengths", 2e-3, HALF, layers=["all"], frame_norm=LENGTH)]
    found += [decaying("all layers, 3x3 rank 32", 8e-4, HALF, layers=["all"], conv_rank=32)]
    return found


REPEATED = (
    LONG,
    "plain",
    "principal",
    "equal lengths",
    "all layers",
    "plain, all layers",
    "all layers, equal lengths",
    "all layers, 3x3 rank 32",
)


def decaying_repeats() -> list[Trial]:
    """Three seeds of what is not clearly behind."""
    chosen = best_of_each(decaying_sweep())
    return on_seeds((chosen[label] for label in REPEATED), SEEDS)


def of_rank(frame: str, rank: int) -> list[Outcome]:
    """Three seeds, or the one of the search."""
    label = f"{frame} r{rank}"
    repeated = finals(near_full.repeats() if rank == 16 else other_ranks())
    return repeated.get(label) or [load(best_of_each(ranks_sweep())[label])]


def _rate(frame: str, rank: int) -> str:
    searched = near_full.sweep() if rank == 16 else ranks_sweep()
    return told_rate(best_of_each(searched)[f"{frame} r{rank}"], searched)


def rank_rows() -> list[list[str]]:
    """Loss, share of full fine-tuning's gain and steps to LoRA's loss at each rank, constant rates."""
    full = finals(near_full.repeats())["full"]
    rows: list[list[str]] = []
    for rank in sorted((16, *RANKS)):
        plain, principal = of_rank("plain", rank), of_rank("principal", rank)
        steps = steps_to(principal, (it.final for it in plain))
        rows.append(
            [
                str(rank),
                _rate("plain", rank),
                _rate("principal", rank),
                *(f"{spread(it.final for it in outcomes)}" for outcomes in (plain, principal)),
                *(
                    _percent(near_full.share_of_gain(outcomes, full[: len(outcomes)]))
                    for outcomes in (plain, principal)
                ),
                told_steps(steps, of=STEPS),
            ]
        )
    return rows


def _percent(shares: list[float]) -> str:
    return f"{100 * mean(shares):.1f} %"


def changes() -> dict[str, list[Outcome]]:
    """Outcomes of every way: three seeds, or the one of the search."""
    repeated = finals(decaying_repeats())
    chosen = best_of_each(decaying_sweep())
    return {label: repeated.get(label, [load(trial)]) for label, trial in chosen.items()}


def _name(label: str) -> str:
    return label.replace("plain", "LoRA")


def change_rows() -> list[list[str]]:
    outcomes, chosen = changes(), best_of_each(decaying_sweep())
    full = finals(near_full.repeats())["full"]
    rows: list[list[str]] = []
    for label, found in outcomes.items():
        steps = steps_to(found, (it.final for it in outcomes[LONG]))
        rows.append(
            [
                _name(label),
                told_rate(chosen[label], decaying_sweep()),
                str(chosen[label].steps),
                f"{spread(it.final for it in found)}",
                _percent(near_full.share_of_gain(found, full[: len(found)])),
                "" if label == LONG else told_steps(steps, of=STEPS),
            ]
        )
    return rows


def found() -> dict[str, str]:
    outcomes = changes()
    aim = mean(it.final for it in outcomes[LONG])
    plot = figures.dots(
        "evidence_half_steps.png",
        f"3D style, after {HALF} steps with a cosine schedule",
        {_name(label): [it.final for it in rows] for label, rows in outcomes.items() if label != LONG},
        "loss on held-out pictures",
        level=(f"LoRA after {STEPS} steps", aim),
    )
    return {
        "plot": plot,
        "half": str(HALF),
        "ratios": ", ".join(f"{row[-1]} at rank {row[0]}" for row in rank_rows()),
        "principal": f"{mean(it.final for it in outcomes['principal']):.4f}",
        "plain": f"{mean(it.final for it in outcomes['plain']):.4f}",
        "aim": f"{aim:.4f}",
        "dropout": f"{outcomes['dropout 0.1'][0].final:.4f}",
        "same": f"{load(decaying('principal', 4e-4, HALF)).final:.4f}",
        "steps": str(STEPS),
        "ranks": table(
            [
                "rank",
                "LoRA's rate",
                "principal's",
                "LoRA",
                "principal",
                "LoRA's share",
                "principal's share",
                "steps to LoRA's loss",
            ],
            rank_rows(),
        ),
        "changes": table(
            ["way", "rate", "steps", "held-out loss", "share of full's gain", "steps to LoRA's loss"],
            change_rows(),
        ),
    }


HALF_STEPS = Experiment(
    NAME, (ranks_sweep, other_ranks, decaying_sweep, decaying_repeats), found, needs=("near_full",)
)
