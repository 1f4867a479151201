"""Noised batches against values computed by hand."""

from __future__ import annotations

import pytest
import torch

from spectune.model.prediction import Ddpm, Flow, make_prediction
from spectune.training.objective.noising import NoiseOptions, noise_at_random, noise_latents
from spectune.training.seeds import derived_generator

EPS = Ddpm("eps")


def pixel(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1), value)


def test_flow_by_hand() -> None:
    noised = noise_latents(Flow(shift=2.5), pixel(2.0), pixel(-1.0), torch.tensor([0.25]))
    assert noised.latents.item() == pytest.approx(0.75 * 2 - 0.25)
    assert noised.target.item() == -3.0
    assert noised.timestep.item() == 250.0
    assert noised.snr.item() == 9.0


def test_eps_by_hand() -> None:
    noised = noise_latents(EPS, pixel(2.0), pixel(-1.0), torch.tensor([0]))
    # alphas_cumprod[0] = 1 - 0.00085
    assert noised.latents.item() == pytest.approx(2 * 0.99915**0.5 - 0.00085**0.5)
    assert (noised.target.item(), noised.timestep.item()) == (-1.0, 0)
    assert noised.snr.item() == pytest.approx(0.99915 / 0.00085)


@pytest.mark.parametrize(("name", "target"), [("eps", -1.0), ("v", -(0.99915**0.5) - 2 * 0.00085**0.5)])
def test_a_perturbation_is_only_in_the_input(name: str, target: float) -> None:
    prediction = make_prediction(name)
    noised = noise_latents(prediction, pixel(2.0), pixel(-1.0), torch.tensor([0]), perturbation=pixel(0.5))
    assert noised.latents.item() == pytest.approx(2 * 0.99915**0.5 + (-1 + 0.5) * 0.00085**0.5)
    assert noised.target.item() == pytest.approx(target)


def test_noised_batches_are_float32_and_depend_on_the_generator_only() -> None:
    x0 = torch.zeros(3, 4, 2, 2, dtype=torch.bfloat16)
    noise = NoiseOptions(offset=0.1, perturbation=0.1)
    first, again, other = (
        noise_at_random(EPS, x0, derived_generator(1, "n", i), noise=noise) for i in (0, 0, 1)
    )
    assert first.latents.dtype == first.target.dtype == torch.float32
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(first.target, again.target)
    assert not torch.equal(first.latents, other.latents)


def test_an_offset_shifts_the_mean_of_each_channel() -> None:
    x0 = torch.zeros(64, 4, 8, 8)
    plain = noise_at_random(EPS, x0, derived_generator(1, "n"))
    offset = noise_at_random(EPS, x0, derived_generator(1, "n"), noise=NoiseOptions(offset=0.5))
    shift = offset.target - plain.target
    # one value for each image and channel, with standard deviation 0.5
    torch.testing.assert_close(shift, shift.mean((2, 3), keepdim=True).expand_as(shift), rtol=0, atol=1e-6)
    assert shift.mean((2, 3)).std().item() == pytest.approx(0.5, rel=0.15)
    # the same in x_t and in the target: with x0 = 0, x_t is sigma * target
    sigma = (1 / (1 + EPS.snr(offset.times))).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(offset.latents, sigma * offset.target, rtol=1e-4, atol=1e-5)
    assert torch.equal(offset.times, plain.times)


def test_a_random_perturbation_has_the_given_standard_deviation() -> None:
    x0 = torch.zeros(64, 4, 8, 8)
    plain = noise_at_random(EPS, x0, derived_generator(1, "n"))
    more = noise_at_random(EPS, x0, derived_generator(1, "n"), noise=NoiseOptions(perturbation=0.1))
    assert torch.equal(more.target, plain.target)
    sigma = (1 / (1 + EPS.snr(plain.times))).sqrt().view(-1, 1, 1, 1)
    assert ((more.latents - plain.latents) / sigma).std().item() == pytest.approx(0.1, rel=0.02)


def test_a_shift_by_resolution_gets_the_area_of_the_images() -> None:
    by_size = make_prediction("flow", flow_shift="resolution")
    wide = torch.zeros(5, 4, 128, 256)
    # 8 * 8 * 128 * 256 = 2 * 1048576 pixels: a shift of sqrt(2)
    times = noise_at_random(by_size, wide, derived_generator(1, "n")).times
    torch.testing.assert_close(times, noise_at_random(Flow(2**0.5), wide, derived_generator(1, "n")).times)
    small = noise_at_random(by_size, wide, derived_generator(1, "n"), pixels_per_latent=4).times
    torch.testing.assert_close(small, noise_at_random(Flow(0.5**0.5), wide, derived_generator(1, "n")).times)
