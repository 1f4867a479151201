"""Costs of predictions against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from spectune.model.prediction import Ddpm, Flow, Prediction, make_prediction
from spectune.training.objective.cost import Cost
from spectune.training.objective.edm2 import LearnedWeighting
from spectune.training.objective.losses import LOSSES, HuberThreshold
from spectune.training.objective.noising import NoisedBatch, noise_latents
from spectune.training.objective.weightings import WEIGHTINGS, WeightingOptions

EPS = Ddpm("eps")
PLAIN = Cost(LOSSES["mse"], WEIGHTINGS["none"], WeightingOptions("eps"))


def pixel(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1), value)


def noised_batch(prediction: Prediction, target: torch.Tensor, times: torch.Tensor) -> NoisedBatch:
    return NoisedBatch(torch.zeros_like(target), times, target, times, prediction.snr(times))


def loss_of(cost: Cost, predicted: torch.Tensor, noised: NoisedBatch, **images: torch.Tensor) -> torch.Tensor:
    return cost.of_batch(noised, cost.images(predicted, noised, **images))


def test_the_weighting_multiplies_each_image() -> None:
    times = torch.tensor([0, 999])
    weights = EPS.snr(times).clamp(max=5) / EPS.snr(times)
    predicted = torch.tensor([1.0, 1.0, 2.0, 2.0]).view(2, 1, 1, 2)
    cost = Cost(LOSSES["mse"], WEIGHTINGS["min_snr"], WeightingOptions("eps"))
    value = loss_of(cost, predicted, noised_batch(EPS, torch.zeros_like(predicted), times))
    assert value.item() == pytest.approx((weights[0].item() * 1 + weights[1].item() * 4) / 2)


def test_masks_and_image_weights_by_hand() -> None:
    predicted = torch.tensor([[1.0, 3.0], [2.0, 4.0]]).view(2, 1, 1, 2)
    noised = noised_batch(EPS, torch.zeros_like(predicted), torch.tensor([5, 6]))
    mask = torch.tensor([[1.0, 0.0], [0.5, 1.0]]).view(2, 1, 1, 2)
    weights = torch.tensor([2.0, 0.5])
    # images: (1*1 + 0*9)/2 = 1/2 and (0.5*4 + 1*16)/2 = 9; weighted 1 and 4.5
    images = PLAIN.images(predicted, noised, image_weights=weights, mask=mask)
    assert images.tolist() == [1.0, 4.5]
    assert loss_of(PLAIN, predicted, noised, image_weights=weights, mask=mask).item() == 2.75
    assert loss_of(PLAIN, predicted, noised).item() == (5 + 10) / 2


def test_the_contrastive_term_by_hand() -> None:
    predicted = torch.tensor([[1.0, 3.0], [2.0, 4.0], [0.0, 0.0]]).view(3, 1, 1, 2)
    target = torch.tensor([[0.0, 0.0], [1.0, 2.0], [5.0, 0.0]]).view(3, 1, 1, 2)
    noised = noised_batch(Flow(), target, torch.tensor([0.5, 0.5, 0.5]))
    cost = Cost(LOSSES["mse"], WEIGHTINGS["none"], WeightingOptions("flow"), contrastive_weight=0.1)
    # own targets: (1+9)/2, (1+4)/2, 25/2
    # the other targets are [5, 0], [0, 0], [1, 2]: (16+9)/2, (4+16)/2, (1+4)/2
    expected = [5 - 1.25, 2.5 - 1.0, 12.5 - 0.25]
    assert cost.images(predicted, noised).tolist() == pytest.approx(expected)
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]]).view(3, 1, 1, 2)
    weights = torch.tensor([2.0, 1.0, 1.0])
    # the mask and the weight of an image apply to both terms: 2 (1/2 - 0.1 * 16/2)
    weighted = cost.images(predicted, noised, image_weights=weights, mask=mask)
    assert weighted.tolist() == pytest.approx([2 * (0.5 - 0.8), *expected[1:]])
    alone = noised_batch(Flow(), target[:1], torch.tensor([0.5]))
    assert cost.images(predicted[:1], alone).tolist() == [5.0]


def test_the_best_contrastive_prediction_by_hand() -> None:
    # minimum of (F-3)^2 - 0.2 (F+1)^2: 2 (F-3) = 0.4 (F+1), F = (3 + 0.2)/0.8 = 4: the target 3 is exceeded
    cost = Cost(LOSSES["mse"], WEIGHTINGS["none"], WeightingOptions("flow"), contrastive_weight=0.2)
    predicted = torch.tensor([4.0, 0.0]).view(2, 1, 1, 1).requires_grad_()
    target = torch.tensor([3.0, -1.0]).view(2, 1, 1, 1)
    costs = cost.images(predicted, noised_batch(Flow(), target, torch.tensor([0.5, 0.5])))
    costs[0].backward()
    assert predicted.grad is not None
    assert predicted.grad[0].item() == pytest.approx(0, abs=1e-6)


def test_a_v_loss_can_be_weighted_like_an_eps_loss() -> None:
    v, times = Ddpm("v"), torch.tensor([300])
    cost = Cost(LOSSES["mse"], WEIGHTINGS["none"], WeightingOptions("v", scale_v_like_noise=True))
    snr = v.snr(times).item()
    value = loss_of(cost, pixel(3.0), noised_batch(v, pixel(0.0), times))
    assert value.item() == pytest.approx(9 * snr / (snr + 1))


@pytest.mark.parametrize("prediction", [Ddpm("eps"), Flow()], ids=["eps", "flow"])
def test_the_huber_threshold_follows_the_noise(prediction: Ddpm | Flow) -> None:
    times = torch.tensor([700]) if isinstance(prediction, Ddpm) else torch.tensor([0.75])
    noised = noised_batch(prediction, pixel(0.0), times)
    cost = Cost(LOSSES["huber"], WEIGHTINGS["none"], WeightingOptions("eps"), HuberThreshold(0.1, "snr"))
    # flow at s = 3/4: sigma = s/(1-s) = 3
    sigma = 3.0 if prediction.name == "flow" else prediction.snr(times).item() ** -0.5
    c = 0.9 / (1 + sigma) ** 2 + 0.1
    assert loss_of(cost, pixel(2.0), noised).item() == pytest.approx(2 * c * ((4 + c * c) ** 0.5 - c))


def test_a_learned_weighting_comes_after_all_others() -> None:
    learned = LearnedWeighting(2)
    learned.frequency.zero_()
    learned.phase.zero_()  # features sqrt(2): u is the sum of the weights
    cost = Cost(LOSSES["mse"], WEIGHTINGS["edm2"], WeightingOptions("eps"), learned=learned)
    # snr 1/9 at s = 3/4 has the importance 2
    noised = noised_batch(Flow(), pixel(0.0), torch.tensor([0.75]))
    assert loss_of(cost, pixel(2.0), noised).item() == 4.0
    with torch.no_grad():
        learned.weight.fill_(0.5)
    weighted = loss_of(cost, pixel(2.0), noised, image_weights=torch.tensor([3.0]))
    assert weighted.item() == pytest.approx(12 / math.e + 2 * 1)
    assert cost.images(pixel(2.0), noised).item() == 4.0


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", ["eps", "v"])
def test_costs_are_finite_at_all_times_of_a_zero_terminal_schedule(name: str, weighting: str) -> None:
    prediction = make_prediction(name, zero_terminal_snr=True)
    times = torch.tensor([0, 998, 999])
    options = WeightingOptions("v" if name == "v" else "eps")
    cost = Cost(LOSSES["huber"], WEIGHTINGS[weighting], options, HuberThreshold(0.1, "snr"))
    x0, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    noised = noise_latents(prediction, x0, noise, times)
    assert bool(noised.latents.isfinite().all())
    assert bool(cost.images(noised.target + 1, noised).isfinite().all())
    torch.testing.assert_close(noised.latents[2], noise[2])


def test_images_of_a_partial_batch_weigh_as_much_as_others() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).view(5, 1, 1, 1).requires_grad_()
    most = noised_batch(EPS, torch.zeros(4, 1, 1, 1), torch.full((4,), 7))
    full = PLAIN.of_batch(most, PLAIN.images(values[:4], most))
    rest = noised_batch(EPS, torch.zeros(1, 1, 1, 1), torch.full((1,), 7))
    (full + PLAIN.of_batch(rest, PLAIN.images(values[4:], rest), share=1 / 4)).backward()
    assert values.grad is not None
    # d(x^2)/dx / 4 for all five
    assert values.grad.flatten().tolist() == [0.5, 1.0, 1.5, 2.0, 2.5]
