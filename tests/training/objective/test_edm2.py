"""The learned weighting: values and gradients by hand, its fixed point, and resuming."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch

from spectune.model.prediction import Ddpm, Flow
from spectune.training.objective.edm2 import (
    LearnedWeighting,
    WeightingTrainer,
    importance,
    weighting_optimizer,
)


def two_features() -> LearnedWeighting:
    """Return a weighting with the features sqrt(2) and -sqrt(2) at all timesteps, so u = a - b."""
    weighting = LearnedWeighting(2)
    weighting.frequency.zero_()
    weighting.phase.copy_(torch.tensor([0.0, 0.5]))
    return weighting


def test_importance_by_hand() -> None:
    # 20*min(snr, 1)/(snr + 1): at 1 10, at 1/4 20*(1/4)/(5/4) = 4, at 3 20/4 = 5, at 199 20/200, so 1
    snr = torch.tensor([1.0, 0.25, 3.0, 199.0, 0.0, math.inf])
    assert importance(snr, 1.0).tolist() == pytest.approx([10, 4, 5, 1, 1, 1])
    # gamma = 4 at its peak: 10*1.25*4/5
    assert importance(torch.tensor([4.0]), 4.0).item() == pytest.approx(10.0)


def test_importance_of_a_flow_level() -> None:
    # ((1 - 0.75)/0.75)^2 = 1/9: 20*(1/9)/(10/9) = 2
    assert importance(Flow().snr(torch.tensor([0.75])), 1.0).item() == pytest.approx(2.0)


def test_costs_are_unchanged_at_the_start() -> None:
    costs = torch.tensor([0.3, 7.0])
    weighted = LearnedWeighting()(costs, torch.tensor([3, 999]), torch.tensor([9.0, 0.0]))
    assert torch.equal(weighted, costs)


def test_value_and_gradient_by_hand() -> None:
    weighting = two_features()
    with torch.no_grad():
        weighting.weight.copy_(torch.tensor([math.log(2.0), 0.0]))  # u = ln 2
    # snr 3: w = 5, cost 6: 6/2 + 5 ln 2; snr 1: w = 10, cost 1: 1/2 + 10 ln 2
    weighted = weighting(torch.tensor([6.0, 1.0]), torch.tensor([0, 500]), torch.tensor([3.0, 1.0]))
    assert weighted.tolist() == pytest.approx([3 + 5 * math.log(2), 0.5 + 10 * math.log(2)])
    weighted.mean().backward()
    # d/du = w - cost/exp(u) = 5 - 3 and 10 - 1/2, their mean 5.75; u = a - b
    assert weighting.weight.grad is not None
    assert weighting.weight.grad.tolist() == pytest.approx([5.75, -5.75], rel=1e-5)


def test_gradient_of_a_feature_that_depends_on_the_timestep() -> None:
    weighting = LearnedWeighting(1)
    weighting.frequency.fill_(0.25)
    weighting.phase.zero_()
    # t = 1000 is level 1: the feature is sqrt(2) cos(pi/2 * 1) = 0; t = 500 is level 0: sqrt(2)
    weighting(torch.tensor([4.0]), torch.tensor([1000.0]), torch.tensor([1.0])).sum().backward()
    assert weighting.weight.grad is not None
    assert weighting.weight.grad.item() == pytest.approx(0.0, abs=1e-5)
    # w - cost = 10 - 4
    weighting(torch.tensor([4.0]), torch.tensor([500.0]), torch.tensor([1.0])).sum().backward()
    assert weighting.weight.grad.item() == pytest.approx(6 * math.sqrt(2), rel=1e-5)


def test_the_gradient_of_a_cost_has_the_weight_of_its_level() -> None:
    weighting = two_features()
    with torch.no_grad():
        weighting.weight.copy_(torch.tensor([math.log(4.0), 0.0]))
    costs = torch.tensor([1.0], requires_grad=True)
    weighting(costs, torch.tensor([10]), torch.tensor([1.0])).sum().backward()
    assert costs.grad is not None
    assert costs.grad.item() == pytest.approx(1 / 4)


def test_it_learns_cost_divided_by_importance_at_every_level() -> None:
    prediction = Ddpm("eps")
    times = prediction.even_times(64)
    snr = prediction.snr(times)
    costs = 0.02 + 0.5 * (1 - times / 999).square()
    weighting = LearnedWeighting()
    optimizer = weighting_optimizer(weighting)
    for _ in range(300):
        optimizer.zero_grad()
        weighting(costs, times, snr).mean().backward()
        optimizer.step()
    expected = (costs / importance(snr, 1.0)).log()
    error = (weighting.log_cost(times) - expected).abs()
    assert expected.max() - expected.min() > 3
    assert error.mean().item() < 0.1


@pytest.mark.parametrize("prediction", [Ddpm("v", zero_terminal_snr=True), Flow()], ids=["v", "flow"])
def test_both_ends_of_the_schedule_are_finite(prediction: Ddpm | Flow) -> None:
    times = torch.tensor([0, 999]) if isinstance(prediction, Ddpm) else torch.tensor([0.0, 1.0])
    weighting = LearnedWeighting()
    with torch.no_grad():
        weighting.weight.normal_(generator=torch.Generator().manual_seed(0))
    weighted = weighting(torch.ones(2), prediction.timestep(times), prediction.snr(times))
    weighted.sum().backward()
    assert weighting.weight.grad is not None
    assert bool(weighted.isfinite().all())
    assert bool(weighting.weight.grad.isfinite().all())


def test_a_saved_weighting_continues_bit_for_bit() -> None:
    def steps(weighting: LearnedWeighting, optimizer: torch.optim.Optimizer, which: range) -> None:
        for step in which:
            optimizer.zero_grad()
            level = torch.tensor([100.0 * step])
            weighting(torch.tensor([0.1 + step]), level, torch.tensor([1.0 / (step + 1)])).sum().backward()
            optimizer.step()

    uninterrupted, stopped = LearnedWeighting(16), LearnedWeighting(16)
    stopped_optimizer = weighting_optimizer(stopped)
    steps(uninterrupted, weighting_optimizer(uninterrupted), range(5))
    steps(stopped, stopped_optimizer, range(3))
    file = io.BytesIO()
    torch.save(WeightingTrainer(stopped, stopped_optimizer).state_dict(), file)
    file.seek(0)
    saved: dict[str, Any] = torch.load(file, weights_only=True)
    resumed = LearnedWeighting(16, seed=9)  # the state contains the features
    again = weighting_optimizer(resumed)
    WeightingTrainer(resumed, again).load_state_dict(saved)
    steps(resumed, again, range(3, 5))
    assert torch.equal(resumed.weight, uninterrupted.weight)
    assert not torch.equal(resumed.weight, stopped.weight)


def test_the_default_settings() -> None:
    weighting = LearnedWeighting()
    group = weighting_optimizer(weighting).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-2, (0.9, 0.99), 0.0)
    assert weighting.weight.dtype == torch.float32
    assert len(weighting.weight) == 128
