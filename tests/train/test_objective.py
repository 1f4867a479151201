"""Losses, weightings and objectives against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from spectune.model.prediction import Ddpm, Flow
from spectune.train.loss import LOSSES, per_image
from spectune.train.objective import OBJECTIVES, Cost, Question, ask, ask_at_random
from spectune.train.seeds import derived_generator
from spectune.train.weighting import WEIGHTINGS, WeightingOptions


def test_mse_by_hand() -> None:
    answer, target = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [3.0, 1.0]])
    assert per_image(LOSSES["mse"](answer, target)).tolist() == [2.5, 5.0]


@pytest.mark.parametrize(
    ("prediction", "expected"), [("eps", [1.0, 1.0, 0.25]), ("v", [1 / 2, 5 / 6, 5 / 21])]
)
def test_min_snr_by_hand(prediction: str, expected: list[float]) -> None:
    snr = torch.tensor([1.0, 5.0, 20.0])
    weights = WEIGHTINGS["min_snr"](snr, WeightingOptions(prediction, min_snr_gamma=5.0))  # pyright: ignore
    assert weights.tolist() == pytest.approx(expected)


def test_no_weighting() -> None:
    assert WEIGHTINGS["none"](torch.tensor([0.1, 9.0]), WeightingOptions("eps")).tolist() == [1.0, 1.0]


def test_flow_question_by_hand() -> None:
    x0, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
    question = ask(Flow(shift=2.5), x0, noise, torch.tensor([0.25]))
    assert question.noised.item() == pytest.approx(0.75 * 2 - 0.25)
    assert question.target.item() == -3.0
    assert question.timestep.item() == 250.0


def test_eps_question_by_hand() -> None:
    x0, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
    question = ask(Ddpm("eps"), x0, noise, torch.tensor([0]))
    # alphas_cumprod[0] = 1 - 0.00085
    assert question.noised.item() == pytest.approx(2 * 0.99915**0.5 - 0.00085**0.5)
    assert (question.target.item(), question.timestep.item()) == (-1.0, 0)


def test_questions_are_float32_and_follow_the_generator() -> None:
    x0 = torch.zeros(3, 4, 2, 2, dtype=torch.bfloat16)
    first, again, other = (
        ask_at_random(OBJECTIVES["eps"](1.0), x0, derived_generator(1, "n", i)) for i in (0, 0, 1)
    )
    assert first.noised.dtype == first.target.dtype == torch.float32
    assert torch.equal(first.noised, again.noised)
    assert not torch.equal(first.noised, other.noised)


def test_cost_weighs_images_by_their_noise() -> None:
    prediction = Ddpm("eps")
    times = torch.tensor([0, 999])
    weights = prediction.snr(times).clamp(max=5) / prediction.snr(times)
    target = torch.zeros(2, 1, 1, 2)
    answer = torch.tensor([1.0, 1.0, 2.0, 2.0]).view(2, 1, 1, 2)
    cost = Cost(LOSSES["mse"], WEIGHTINGS["min_snr"], WeightingOptions("eps"))
    value = cost(prediction, answer, Question(answer, times, target, times))
    assert value.item() == pytest.approx((weights[0].item() * 1 + weights[1].item() * 4) / 2)


def test_the_shift_reaches_flow() -> None:
    assert OBJECTIVES["flow"](2.5) == Flow(shift=2.5)
