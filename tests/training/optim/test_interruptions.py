from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spectune.training import state
from spectune.training.optim.groups import build_optimizer, groups_by_part, step_sizes
from spectune.training.optim.kinds import OPTIMIZERS
from spectune.training.optim.modes import finished_weights
from tests.training.optim.deltas import advance, trained


def header() -> state.StateHeader:
    return state.StateHeader(
        step=4,
        steps=9,
        position=4,
        recipe={},
        base_hash=None,
        frame_hash="",
        data_hash="",
        validation_before=None,
        optimizer_package="",
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    first = trained()
    first_optimizer = build_optimizer(name, groups_by_part(first))
    advance(first_optimizer, first, range(4))
    state.save_state(tmp_path / "t.state", header(), first, first_optimizer)
    advance(first_optimizer, first, range(4, 9))

    second = trained()
    second_optimizer = build_optimizer(name, groups_by_part(second))
    state.load_state(tmp_path / "t.state").restore(second, second_optimizer)
    advance(second_optimizer, second, range(4, 9))

    assert all(torch.equal(first[key], second[key]) for key in first)
    assert step_sizes(first_optimizer) == step_sizes(second_optimizer)
    with (
        finished_weights(first_optimizer, list(first.values())),
        finished_weights(second_optimizer, list(second.values())),
    ):
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_without_its_state_differs(name: str) -> None:
    """Check that the state matters, so that the test above can fail."""
    continued, restarted = trained(), trained()
    optimizer = build_optimizer(name, groups_by_part(continued))
    advance(optimizer, continued, range(4))
    with torch.no_grad():
        for key, tensor in restarted.items():
            tensor.copy_(continued[key])
    advance(optimizer, continued, range(4, 6))
    advance(build_optimizer(name, groups_by_part(restarted)), restarted, range(4, 6))
    assert not torch.equal(continued["unet.a.up"], restarted["unet.a.up"])
