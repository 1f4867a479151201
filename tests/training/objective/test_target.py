"""Questions and costs against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from spectune.model.prediction import Ddpm, Flow, LogitNormal
from spectune.training.objective.edm2 import LearnedWeighting
from spectune.training.objective.losses import LOSSES, HuberTurn
from spectune.training.objective.target import (
    OBJECTIVES,
    Cost,
    NoiseOptions,
    ObjectiveOptions,
    Question,
    ask,
    ask_at_random,
)
from spectune.training.objective.weightings import WEIGHTINGS, WeightingOptions
from spectune.training.seeds import derived_generator

EPS = OBJECTIVES["eps"](ObjectiveOptions())
PLAIN = Cost(LOSSES["mse"], WEIGHTINGS["none"], WeightingOptions("eps"))


def pixel(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1), value)


def question(target: torch.Tensor, times: torch.Tensor) -> Question:
    return Question(torch.zeros_like(target), times, target, times)


def test_flow_question_by_hand() -> None:
    question = ask(Flow(shift=2.5), pixel(2.0), pixel(-1.0), torch.tensor([0.25]))
    assert question.noised.item() == pytest.approx(0.75 * 2 - 0.25)
    assert question.target.item() == -3.0
    assert question.timestep.item() == 250.0


def test_eps_question_by_hand() -> None:
    question = ask(Ddpm("eps"), pixel(2.0), pixel(-1.0), torch.tensor([0]))
    # alphas_cumprod[0] = 1 - 0.00085
    assert question.noised.item() == pytest.approx(2 * 0.99915**0.5 - 0.00085**0.5)
    assert (question.target.item(), question.timestep.item()) == (-1.0, 0)


@pytest.mark.parametrize(("name", "target"), [("eps", -1.0), ("v", -(0.99915**0.5) - 2 * 0.00085**0.5)])
def test_a_perturbation_is_in_what_the_network_sees_only(name: str, target: float) -> None:
    prediction = OBJECTIVES[name](ObjectiveOptions())
    asked = ask(prediction, pixel(2.0), pixel(-1.0), torch.tensor([0]), perturbation=pixel(0.5))
    assert asked.noised.item() == pytest.approx(2 * 0.99915**0.5 + (-1 + 0.5) * 0.00085**0.5)
    assert asked.target.item() == pytest.approx(target)


def test_questions_are_float32_and_follow_the_generator() -> None:
    x0 = torch.zeros(3, 4, 2, 2, dtype=torch.bfloat16)
    noise = NoiseOptions(offset=0.1, perturbation=0.1)
    first, again, other = (
        ask_at_random(EPS, x0, derived_generator(1, "n", i), noise=noise) for i in (0, 0, 1)
    )
    assert first.noised.dtype == first.target.dtype == torch.float32
    assert torch.equal(first.noised, again.noised)
    assert torch.equal(first.target, again.target)
    assert not torch.equal(first.noised, other.noised)


def test_an_offset_moves_the_mean_of_each_channel() -> None:
    x0 = torch.zeros(64, 4, 8, 8)
    plain = ask_at_random(EPS, x0, derived_generator(1, "n"))
    offset = ask_at_random(EPS, x0, derived_generator(1, "n"), noise=NoiseOptions(offset=0.5))
    moved = offset.target - plain.target
    # one number for each image and channel, of standard deviation 0.5
    torch.testing.assert_close(moved, moved.mean((2, 3), keepdim=True).expand_as(moved), rtol=0, atol=1e-6)
    assert moved.mean((2, 3)).std().item() == pytest.approx(0.5, rel=0.15)
    # in x_t as in the target: with x0 = 0, x_t is sigma * target
    sigma = (1 / (1 + EPS.snr(offset.times))).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(offset.noised, sigma * offset.target, rtol=1e-4, atol=1e-5)
    assert torch.equal(offset.times, plain.times)


def test_a_random_perturbation_has_its_size() -> None:
    x0 = torch.zeros(64, 4, 8, 8)
    plain = ask_at_random(EPS, x0, derived_generator(1, "n"))
    more = ask_at_random(EPS, x0, derived_generator(1, "n"), noise=NoiseOptions(perturbation=0.1))
    assert torch.equal(more.target, plain.target)
    sigma = (1 / (1 + EPS.snr(plain.times))).sqrt().view(-1, 1, 1, 1)
    assert ((more.noised - plain.noised) / sigma).std().item() == pytest.approx(0.1, rel=0.02)


def test_the_area_of_the_pictures_reaches_the_shift() -> None:
    by_size = OBJECTIVES["flow"](ObjectiveOptions(flow_shift="resolution"))
    wide = torch.zeros(5, 4, 128, 256)
    # 8 * 8 * 128 * 256 = 2 * 1048576 pixels: a shift of sqrt(2)
    found = ask_at_random(by_size, wide, derived_generator(1, "n")).times
    torch.testing.assert_close(found, ask_at_random(Flow(2**0.5), wide, derived_generator(1, "n")).times)
    small = ask_at_random(by_size, wide, derived_generator(1, "n"), pixels_per_latent=4).times
    torch.testing.assert_close(small, ask_at_random(Flow(0.5**0.5), wide, derived_generator(1, "n")).times)


def test_cost_weighs_images_by_their_noise() -> None:
    prediction = Ddpm("eps")
    times = torch.tensor([0, 999])
    weights = prediction.snr(times).clamp(max=5) / prediction.snr(times)
    answer = torch.tensor([1.0, 1.0, 2.0, 2.0]).view(2, 1, 1, 2)
    cost = Cost(LOSSES["mse"], WEIGHTINGS["min_snr"], WeightingOptions("eps"))
    value = cost(prediction, answer, question(torch.zeros_like(answer), times))
    assert value.item() == pytest.approx((weights[0].item() * 1 + weights[1].item() * 4) / 2)


def test_masks_and_image_weights_by_hand() -> None:
    answer = torch.tensor([[1.0, 3.0], [2.0, 4.0]]).view(2, 1, 1, 2)
    asked = question(torch.zeros_like(answer), torch.tensor([5, 6]))
    mask = torch.tensor([[1.0, 0.0], [0.5, 1.0]]).view(2, 1, 1, 2)
    weights = torch.tensor([2.0, 0.5])
    # images: (1*1 + 0*9)/2 = 1/2 and (0.5*4 + 1*16)/2 = 9; weighted 1 and 4.5
    images = PLAIN.images(EPS, answer, asked, image_weights=weights, mask=mask)
    assert images.tolist() == [1.0, 4.5]
    assert PLAIN(EPS, answer, asked, image_weights=weights, mask=mask).item() == 2.75
    assert PLAIN(EPS, answer, asked).item() == (5 + 10) / 2


def test_v_is_weighed_like_noise() -> None:
    v, times = Ddpm("v"), torch.tensor([300])
    asked = question(pixel(0.0), times)
    cost = Cost(LOSSES["mse"], WEIGHTINGS["none"], WeightingOptions("v", scale_v_like_noise=True))
    snr = v.snr(times).item()
    assert cost(v, pixel(3.0), asked).item() == pytest.approx(9 * snr / (snr + 1))


@pytest.mark.parametrize("prediction", [Ddpm("eps"), Flow()], ids=["eps", "flow"])
def test_the_turn_of_huber_follows_the_noise(prediction: Ddpm | Flow) -> None:
    times = torch.tensor([700]) if isinstance(prediction, Ddpm) else torch.tensor([0.75])
    asked = question(pixel(0.0), times)
    cost = Cost(LOSSES["huber"], WEIGHTINGS["none"], WeightingOptions("eps"), HuberTurn(0.1, "snr"))
    # flow at s = 3/4: sigma = s/(1-s) = 3
    sigma = 3.0 if prediction.name == "flow" else prediction.snr(times).item() ** -0.5
    c = 0.9 / (1 + sigma) ** 2 + 0.1
    assert cost(prediction, pixel(2.0), asked).item() == pytest.approx(2 * c * ((4 + c * c) ** 0.5 - c))


def test_a_learned_weighting_comes_after_all_others() -> None:
    learned = LearnedWeighting(2)
    learned.frequency.zero_()
    learned.phase.zero_()  # features sqrt(2): u is the sum of the weights
    cost = Cost(LOSSES["mse"], WEIGHTINGS["edm2"], WeightingOptions("eps"), learned=learned)
    # snr 1/9 at s = 3/4 has the importance 2
    asked = question(pixel(0.0), torch.tensor([0.75]))
    assert cost(Flow(), pixel(2.0), asked).item() == 4.0
    with torch.no_grad():
        learned.weight.fill_(0.5)
    weighted = cost(Flow(), pixel(2.0), asked, image_weights=torch.tensor([3.0]))
    assert weighted.item() == pytest.approx(12 / math.e + 2 * 1)
    assert cost.images(Flow(), pixel(2.0), asked).item() == 4.0


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", ["eps", "v"])
def test_no_time_of_a_zero_terminal_schedule_gives_a_cost_that_is_not_a_number(
    name: str, weighting: str
) -> None:
    prediction = OBJECTIVES[name](ObjectiveOptions(zero_terminal_snr=True))
    times = torch.tensor([0, 998, 999])
    options = WeightingOptions("v" if name == "v" else "eps")
    cost = Cost(LOSSES["huber"], WEIGHTINGS[weighting], options, HuberTurn(0.1, "snr"))
    x0, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    asked = ask(prediction, x0, noise, times)
    assert bool(asked.noised.isfinite().all())
    assert bool(cost.images(prediction, asked.target + 1, asked).isfinite().all())
    torch.testing.assert_close(asked.noised[2], noise[2])


def test_options_reach_the_predictions() -> None:
    options = ObjectiveOptions(2.5, LogitNormal(0.5, 2.0), True)
    assert OBJECTIVES["flow"](options) == Flow(2.5, LogitNormal(0.5, 2.0))
    assert OBJECTIVES["v"](options) == Ddpm("v", True)
    assert OBJECTIVES["eps"](options) == Ddpm("eps", True)
    assert OBJECTIVES["eps"](ObjectiveOptions()) == Ddpm("eps", False)
