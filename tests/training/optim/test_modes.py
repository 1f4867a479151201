from __future__ import annotations

import pytest
import torch
from torch import nn

from spectune.training.optim.groups import build_optimizer, groups_by_part
from spectune.training.optim.kinds import OPTIMIZERS
from spectune.training.optim.modes import finished_weights
from tests.training.optim.deltas import advance, trained

SCHEDULE_FREE = [name for name, kind in OPTIMIZERS.items() if kind.schedule_free]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_finished_weights_do_not_change_the_training(name: str) -> None:
    switched, plain = trained(), trained()
    optimizers = [build_optimizer(name, groups_by_part(tensors)) for tensors in (switched, plain)]
    for seed in range(4):
        advance(optimizers[0], switched, range(seed, seed + 1))
        advance(optimizers[1], plain, range(seed, seed + 1))
        with finished_weights(optimizers[0], list(switched.values())):
            pass
    assert all(torch.equal(switched[key], plain[key]) for key in plain)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_schedule_free_optimizers_have_averaged_weights(name: str) -> None:
    tensors = trained()
    optimizer = build_optimizer(name, groups_by_part(tensors))
    advance(optimizer, tensors, range(3))
    before = {key: value.detach().clone() for key, value in tensors.items()}
    with finished_weights(optimizer, list(tensors.values())):
        same = all(torch.equal(tensors[key], before[key]) for key in tensors)
        assert same == (name not in SCHEDULE_FREE)
        if name in SCHEDULE_FREE:
            with pytest.raises(Exception, match=r"(Not|was not) in train mode"):
                optimizer.step()
    assert all(torch.equal(tensors[key], before[key]) for key in tensors)


def test_the_average_of_schedule_free_steps_by_hand() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = build_optimizer("adamw_schedule_free", [{"params": [parameter]}], learning_rate=0.25)
    for _ in range(3):
        parameter.grad = torch.ones(1)
        optimizer.step()
    with finished_weights(optimizer, [parameter]):
        # The average of -1/4, -2/4 and -3/4, with equal weights.
        assert parameter.item() == pytest.approx(-0.5)
    assert parameter.item() == pytest.approx(0.9 * -0.5 + 0.1 * -0.75)
