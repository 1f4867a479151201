"""Updates of bf16 parameters that are smaller than the spacing of bf16 numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectune.training.optim.groups import build_optimizer
from spectune.training.optim.kinds import OPTIMIZERS


def lost_in_rounding(*, stochastic: bool, schedule_free: bool) -> float:
    """Return the share of an update that bf16 loses, compared to float32, in 1000 steps of 1e-4."""
    distances: list[float] = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.ones(32, 40, dtype=dtype))
        optimizer = build_optimizer(
            "prodigy_plus_schedule_free",
            [{"params": [parameter]}],
            options={
                "d0": 1e-4,
                "prodigy_steps": 1,  # freezes d: every step is d0 times a gradient divided by its size
                "betas": (0.9, 0.0),
                "stochastic_rounding": stochastic,
                "use_schedulefree": schedule_free,
            },
        )
        for _ in range(1000):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        distances.append(1 - parameter.detach().float().mean().item())
    assert distances[0] > 0.05
    return 1 - distances[1] / distances[0]


@pytest.mark.parametrize("schedule_free", [pytest.param(True, marks=pytest.mark.slow), False])
def test_stochastic_rounding_keeps_small_updates(schedule_free: bool) -> None:
    assert OPTIMIZERS["prodigy_plus_schedule_free"].rounds_stochastically
    assert abs(lost_in_rounding(stochastic=True, schedule_free=schedule_free)) < 0.03


@pytest.mark.parametrize("schedule_free", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_plain_rounding_loses_small_updates(schedule_free: bool) -> None:
    # the bf16 numbers next to 1 are 0.4% away
    assert lost_in_rounding(stochastic=False, schedule_free=schedule_free) == 1.0


@pytest.mark.parametrize(
    "name", [name for name, kind in OPTIMIZERS.items() if not kind.rounds_stochastically]
)
def test_other_optimizers_do_not_round_stochastically(name: str) -> None:
    """They lose every update of 1e-4 of a bf16 parameter."""
    parameter = nn.Parameter(torch.ones(64, 80, dtype=torch.bfloat16))
    fixed = OPTIMIZERS[name].fixed_learning_rate
    options = {} if fixed is None else {"d0": 1e-4, "growth_rate": 1.0001}
    rate = 1e-4 if fixed is None else None
    optimizer = build_optimizer(name, [{"params": [parameter]}], learning_rate=rate, options=options)
    for _ in range(20):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones_like(parameter))
