"""1, second part. Other ranks, and whether the principal reaches plain LoRA's loss in half of its steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.experiment import SEEDS, Experiment, best_of_each, on_seeds
from experiments.near_full import chosen, framed
from experiments.trial import Trial

NAME = "half_steps"
RANKS = (4, 8, 32)  # beside 16, where learning rates are searched
STEPS = 120
UNIT = 0.577  # 1/sqrt(3), the length of a row of plain LoRA


def other_ranks() -> list[Trial]:
    """The other ranks at the rate of rank 16."""
    found: list[Trial] = []
    for rank in RANKS:
        for frame in ("plain", "principal"):
            rate = chosen()[f"{frame} r16"].rate
            assert rate is not None
            found.append(replace(framed(frame, rank, rate), experiment=NAME))
    return on_seeds(found, SEEDS)


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


def decaying_sweep() -> list[Trial]:
    """Plain LoRA over all steps, and what may reach its loss in half: changes to the principal."""
    found = [decaying("plain, 120 steps", rate, STEPS, frame="plain") for rate in (1e-3, 2e-3)]
    found += [decaying("plain", rate, HALF, frame="plain") for rate in (1e-3, 2e-3)]
    found += [decaying("principal", rate, HALF) for rate in (4e-4, 8e-4)]
    found += [decaying("equal lengths", rate, HALF, frame_norm=UNIT) for rate in (1e-3, 2e-3)]
    found += [decaying("all layers", rate, HALF, layers=["all"]) for rate in (4e-4, 8e-4)]
    found += [decaying("3x3 rank 32", rate, HALF, conv_rank=32) for rate in (4e-4, 8e-4)]
    found += [decaying("linear rank 32", rate, HALF, rank=32, conv_rank=16) for rate in (4e-4, 8e-4)]
    found += [decaying("gradient", rate, HALF, frame="gradient") for rate in (1e-3, 2e-3)]
    return found


def decaying_repeats() -> list[Trial]:
    return on_seeds(best_of_each(decaying_sweep()).values(), SEEDS)


def found() -> dict[str, str]:
    return {}


HALF_STEPS = Experiment(NAME, (other_ranks, decaying_sweep, decaying_repeats), found)
