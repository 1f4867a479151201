from __future__ import annotations

import math
from typing import Any

import pytest

from spectune.training.optim.schedules import SCHEDULES, rate_factor


@pytest.mark.parametrize(
    ("schedule", "step", "shape", "expected"),
    [
        # 10 steps, 2 of them warm-up: progress is (step - 2) / 8
        ("constant", 0, {}, 0.5),
        ("constant", 1, {}, 1.0),
        ("constant", 9, {}, 1.0),
        ("constant", 10, {"final_share": 0.5}, 1.0),
        ("linear", 1, {"final_share": 0.5}, 1.0),
        ("linear", 2, {}, 1.0),
        ("linear", 6, {}, 0.5),
        ("linear", 10, {}, 0.0),
        ("linear", 6, {"final_share": 0.2}, 0.6),
        ("cosine", 4, {}, (1 + math.sqrt(0.5)) / 2),
        ("cosine", 6, {}, 0.5),
        ("cosine", 6, {"final_share": 0.1}, 0.55),
        ("cosine_restarts", 6, {}, 0.5),
        ("cosine_restarts", 4, {"cycles": 2}, 0.5),
        ("cosine_restarts", 6, {"cycles": 2}, 1.0),
        ("cosine_restarts", 8, {"cycles": 2}, 0.5),
        ("cosine_restarts", 10, {"cycles": 2}, 0.0),
        ("polynomial", 6, {}, 0.5),
        ("polynomial", 6, {"power": 2.0}, 0.25),
        ("polynomial", 8, {"power": 0.5}, 0.5),
        ("polynomial", 6, {"power": 2.0, "final_share": 0.2}, 0.4),
    ],
)
def test_factors_by_hand(schedule: str, step: int, shape: dict[str, Any], expected: float) -> None:
    factor = rate_factor(schedule, step, steps=10, warmup_steps=2, **shape)
    assert factor == pytest.approx(expected)


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "constant"])
def test_decaying_schedules_start_at_one_and_end_at_the_final_share(schedule: str) -> None:
    shape: dict[str, Any] = {"cycles": 3, "power": 1.7, "final_share": 0.125}
    factors = [rate_factor(schedule, step, steps=60, warmup_steps=0, **shape) for step in range(63)]
    assert factors[0] == 1.0
    assert factors[60:] == [0.125] * 3  # steps after the end, if a run was resumed with fewer steps
    assert all(0.125 <= factor <= 1 for factor in factors)


def test_a_warm_up_as_long_as_the_run() -> None:
    factors = [rate_factor("cosine", step, steps=4, warmup_steps=4) for step in range(4)]
    assert factors == [0.25, 0.5, 0.75, 1.0]
