"""Losses against values computed by hand and against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from spectune.training.objective.losses import (
    HUBER_LOSSES,
    LOSSES,
    HuberThreshold,
    fft_amp,
    fft_high,
    fft_l1,
    huber,
    multiscale,
    per_image,
    radial_weights,
    smooth_l1,
)

SHAPE = (2, 4, 6, 5)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


def images(*rows: list[list[float]]) -> torch.Tensor:
    """Return images with one channel each."""
    return torch.tensor(rows)[:, None]


def cost(name: str, predicted: torch.Tensor, target: torch.Tensor, **options: torch.Tensor) -> list[float]:
    return per_image(LOSSES[name](predicted, target, **options)).tolist()


def test_mse_and_l1_by_hand() -> None:
    predicted, target = images([[1.0, 2.0]], [[0.0, 0.0]]), images([[0.0, 4.0]], [[3.0, 1.0]])
    assert cost("mse", predicted, target) == [(1 + 4) / 2, (9 + 1) / 2]
    assert cost("l1", predicted, target) == [(1 + 2) / 2, (3 + 1) / 2]


def test_huber_by_hand() -> None:
    # d = 3, c = 4: sqrt(9 + 16) - 4 = 1
    three, zero = images([[3.0]]), images([[0.0]])
    assert huber(three, zero, 4.0).item() == pytest.approx(2 * 4 * 1)
    assert smooth_l1(three, zero, 4.0).item() == pytest.approx(2 * 1)
    # d = 1, c = 0.1: sqrt(1.01) - 0.1 = 0.90498756
    one = images([[1.0]])
    assert cost("huber", one, zero) == pytest.approx([0.2 * 0.90498756])
    assert cost("smooth_l1", one, zero) == pytest.approx([2 * 0.90498756])


def test_huber_is_exact_near_zero_where_a_float32_difference_would_be_0() -> None:
    # sqrt(1e-8 + 1) - 1 is 0 in float32; the loss is 2c * 5e-9 = 1e-8
    small, zero = images([[1e-4]]), images([[0.0]])
    assert math.sqrt(torch.tensor(1e-8 + 1.0).item()) - 1 < 1e-8
    assert huber(small, zero, 1.0).item() == pytest.approx(1e-8, rel=1e-5)


def test_each_image_can_have_its_own_threshold() -> None:
    predicted, target = images([[3.0]], [[3.0]]), images([[0.0]], [[0.0]])
    # c = 4: 2*4*1; c = 1: 2*(sqrt(10) - 1)
    costs = per_image(LOSSES["huber"](predicted, target, huber_c=torch.tensor([4.0, 1.0])))
    assert costs.tolist() == pytest.approx([8.0, 2 * (math.sqrt(10) - 1)])


def test_the_scheduled_threshold_by_hand() -> None:
    threshold = HuberThreshold(0.1, "snr")
    # snr = 1/4: sigma = 2, c = 0.9/9 + 0.1 = 0.2; snr = 1: sigma = 1, c = 0.9/4 + 0.1 = 0.325
    assert threshold.at(torch.tensor([0.25, 1.0])).tolist() == pytest.approx([0.2, 0.325])
    # pure noise and clean latents
    assert threshold.at(torch.tensor([0.0, math.inf])).tolist() == pytest.approx([0.1, 1.0])
    assert HuberThreshold(0.3).at(torch.tensor([0.0, 7.0])).tolist() == pytest.approx([0.3, 0.3])


def test_fft_l1_by_hand() -> None:
    # F of [[a, b], [c, d]] is [[a+b+c+d, a-b+c-d], [a+b-c-d, a-b-c+d]]/2
    predicted, zero = images([[1.0, 2.0], [2.0, 4.0]]), torch.zeros(1, 1, 2, 2)
    # sums: 9, 1-2+2-4 = -3, 1+2-2-4 = -3, 1-2-2+4 = 1
    assert cost("fft_l1", predicted, zero) == pytest.approx([(9 + 3 + 3 + 1) / 2 / 4])
    assert LOSSES["fft"].cost is LOSSES["fft_l1"].cost


def test_squared_fft_error_is_mse(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    predicted, target = pair
    squares = per_image(fft_l1(predicted, target).square())
    torch.testing.assert_close(squares, per_image((predicted - target).square()))
    wrong = torch.fft.fft2(predicted - target).abs().square()  # without the ortho norm
    assert not torch.allclose(per_image(wrong), per_image((predicted - target).square()), rtol=0.01)


def test_amplitudes_ignore_positions(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    predicted, _ = pair
    moved = predicted.roll((2, 1), dims=(-2, -1))
    assert per_image(fft_amp(moved, predicted)).max().item() < 1e-6
    assert per_image(fft_l1(moved, predicted)).min().item() > 0.5
    # F([1, 3]) = [4, -2]/sqrt(2), F([2, 0]) = [2, 2]/sqrt(2): amplitudes differ by 2/sqrt(2) and 0
    assert per_image(fft_amp(images([[1.0, 3.0]]), images([[2.0, 0.0]]))).item() == pytest.approx(
        (2 / math.sqrt(2) + 0) / 2
    )


def test_high_frequencies_have_larger_weights() -> None:
    # one row of two: frequencies 0 and 1/2, weights 1 and 1 + 4 = 5 over their mean 3
    assert radial_weights(1, 2)[0].tolist() == pytest.approx([1 / 3, 5 / 3])
    # |F([1, 3])| = [4, 2]/sqrt(2)
    expected = (4 / 3 + 2 * 5 / 3) / math.sqrt(2) / 2
    assert per_image(fft_high(images([[1.0, 3.0]]), torch.zeros(1, 1, 1, 2))).item() == pytest.approx(
        expected
    )
    weights = radial_weights(8, 6)
    assert weights.mean().item() == pytest.approx(1.0)
    # the corner of both Nyquist frequencies is sqrt(2) away
    assert (weights[4, 3] / weights[0, 0]).item() == pytest.approx(1 + 4 * math.sqrt(2))
    assert (weights[4, 0] / weights[0, 0]).item() == pytest.approx(5.0)


def test_multiscale_by_hand() -> None:
    # a checkerboard of +-1 has squares of 1 and averages of 0; a constant 1 has 1 at all three scales
    board = (torch.arange(4)[:, None] + torch.arange(4)) % 2 * 2.0 - 1
    predicted = torch.stack([board, torch.ones(4, 4)])[:, None]
    assert multiscale(predicted, torch.zeros_like(predicted)).tolist() == [[1, 0, 0], [1, 1, 1]]
    assert cost("multiscale", predicted, torch.zeros_like(predicted)) == pytest.approx([1 / 3, 1.0])


def test_multiscale_of_sizes_that_are_not_multiples_of_four() -> None:
    # [1, 1, 7]: squares 17; pairs [1, 7] -> 25; one average 3 -> 9
    row = images([[1.0, 1.0, 7.0]])
    assert multiscale(row, torch.zeros_like(row)).tolist() == [[17, 25, 9]]


@pytest.mark.parametrize("name", LOSSES)
def test_masked_errors_do_not_change_the_loss(name: str, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    predicted, target = pair
    mask = torch.zeros(2, 1, 6, 5)
    mask[..., :3, :] = 1
    elsewhere = predicted.clone()
    elsewhere[..., 3:, :] += 5
    first, second = (LOSSES[name](values, target, mask=mask) for values in (predicted, elsewhere))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    inside = predicted.clone()
    inside[..., :3, :] += 5
    assert not torch.allclose(per_image(LOSSES[name](inside, target, mask=mask)), per_image(first), rtol=0.01)
    everywhere = LOSSES[name](predicted, target, mask=torch.ones(2, 1, 6, 5))
    torch.testing.assert_close(everywhere, LOSSES[name](predicted, target), rtol=0, atol=0)


def test_masks_by_hand() -> None:
    # elementwise, the mask multiplies the cost: 0.5 * 4; with a transform, the latents: |0.5 * 2|
    predicted, zero, half = images([[2.0]]), images([[0.0]]), torch.full((1, 1, 1, 1), 0.5)
    assert cost("mse", predicted, zero, mask=half) == [2.0]
    assert cost("fft", predicted, zero, mask=half) == [1.0]


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_float32_and_has_a_finite_gradient_at_zero_error(name: str) -> None:
    target = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).bfloat16()
    predicted = target.clone().requires_grad_()
    costs = LOSSES[name](predicted, target)
    assert costs.dtype == torch.float32
    assert len(costs) == 2
    assert per_image(costs).tolist() == [0.0, 0.0]
    costs.mean().backward()
    assert predicted.grad is not None
    assert bool(predicted.grad.isfinite().all())


def test_huber_losses() -> None:
    assert HUBER_LOSSES == ("huber", "smooth_l1")


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_described(name: str) -> None:
    loss = LOSSES[name]
    assert all((loss.help, loss.formula, loss.source))
    assert "\n" not in loss.help
