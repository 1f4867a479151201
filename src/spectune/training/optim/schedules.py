"""The table of learning rate schedules, as functions of progress."""

from __future__ import annotations

import math
from collections.abc import Callable

# (finished share of the run in 0..1, cycles, power) -> factor of the learning rate, from 1 down to 0
Schedule = Callable[[float, int, float], float]


def _cosine(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2


def _cosine_restarts(done: float, cycles: int, power: float) -> float:
    # Loshchilov and Hutter 2017, arXiv:1608.03983, with cycles of equal length
    return 0.0 if done >= 1 else _cosine(cycles * done % 1)


SCHEDULES: dict[str, Schedule] = {
    "constant": lambda done, cycles, power: 1.0,
    "linear": lambda done, cycles, power: 1 - done,
    "cosine": lambda done, cycles, power: _cosine(done),
    "cosine_restarts": _cosine_restarts,
    "polynomial": lambda done, cycles, power: (1 - done) ** power,
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
    """Return the factor of the learning rate after `step` finished steps of `steps`.

    The factor rises linearly to 1 during the warm-up, then follows the schedule to `final_share`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    return final_share + (1 - final_share) * SCHEDULES[schedule](done, cycles, power)
