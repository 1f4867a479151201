"""Learning rate schedules as functions of progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What bends a schedule."""

    cycles: int = 1  # of cosine_restarts
    power: float = 1.0  # of polynomial


Schedule = Callable[[float, Shape], float]  # share of the run done, 0..1 -> 1 at the start, 0 at the end


def _cosine(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2


def _cosine_restarts(done: float, shape: Shape) -> float:
    # Loshchilov and Hutter 2017, arXiv:1608.03983, with cycles of one length
    return 0.0 if done >= 1 else _cosine(shape.cycles * done % 1)


SCHEDULES: dict[str, Schedule] = {
    "constant": lambda done, shape: 1.0,
    "linear": lambda done, shape: 1 - done,
    "cosine": lambda done, shape: _cosine(done),
    "cosine_restarts": _cosine_restarts,
    "polynomial": lambda done, shape: (1 - done) ** shape.power,
}


def rate_factor(
    schedule: str,
    step: int,
    *,
    steps: int,
    warmup_steps: int,
    cycles: int = 1,
    power: float = 1.0,
    final_share: float = 0.0,
) -> float:
    """Factor of the learning rate after `step` finished steps of `steps`.

    A linear warm-up to 1, then the schedule, which falls to `final_share` after the last step.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    height = SCHEDULES[schedule](done, Shape(cycles=cycles, power=power))
    return final_share + (1 - final_share) * height
