"""The moving average that is saved instead of the trained tensors."""

from __future__ import annotations

import torch
from torch import nn

from spectune.training.ema import MovingAverage


def test_the_average_by_hand() -> None:
    """The final decay is 0.5. After one step it is 2/11 = (1+1)/(10+1), after two steps 3/12."""
    tensor = nn.Parameter(torch.tensor([0.0]))
    average = MovingAverage({"t": tensor}, 0.5)
    with torch.no_grad():
        tensor.fill_(11.0)
    average.update()
    torch.testing.assert_close(average.average["t"], torch.tensor([11.0 * 9 / 11]))  # 0*2/11 + 11*9/11
    with torch.no_grad():
        tensor.fill_(1.0)
    average.update()
    torch.testing.assert_close(average.average["t"], torch.tensor([9.0 * 0.25 + 1.0 * 0.75]))


def test_long_runs_reach_the_final_decay() -> None:
    tensor = nn.Parameter(torch.tensor([1.0]))
    average = MovingAverage({"t": tensor}, 0.5)
    average.restore({"t": torch.tensor([0.0])}, steps=1000)
    average.update()
    assert float(average.average["t"]) == 0.5


def test_the_trained_tensors_are_restored_bit_for_bit() -> None:
    tensor = nn.Parameter(torch.tensor([0.1], dtype=torch.bfloat16))
    average = MovingAverage({"t": tensor}, 0.9)
    before = tensor.detach().clone()
    average.restore({"t": torch.tensor([3.0])}, steps=5)
    with average.in_place():
        assert float(tensor) == 3.0
    assert torch.equal(tensor, before)
