"""The bridge between EPS and flow, checked against SDXL's schedule."""

from __future__ import annotations

import pytest
import torch

from spectune.model.prediction import Ddpm, Flow
from spectune.training.eps_to_flow.bridge import Bridge, interpolate, of_flow_model

BRIDGE = Bridge()


def latents_and_noise(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 4, 6, 6)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def test_the_range_of_the_schedule() -> None:
    assert BRIDGE.lowest == pytest.approx(0.0283, abs=1e-4)
    assert BRIDGE.highest == pytest.approx(0.936, abs=1e-3)


def test_the_timestep_of_a_level_is_the_inverse_of_the_schedule() -> None:
    steps = torch.tensor([0, 1, 250, 700, 999])
    assert torch.allclose(BRIDGE.timestep(BRIDGE.levels[steps]), steps.float(), atol=1e-3)
    assert BRIDGE.timestep(torch.tensor([0.0, 1.0])).tolist() == [0.0, 999.0]
    middle = BRIDGE.timestep((BRIDGE.levels[10:11] + BRIDGE.levels[11:12]) / 2)
    assert 10 < float(middle) < 11


def test_the_network_input_is_the_image_noised_by_its_own_schedule() -> None:
    x0, noise = latents_and_noise(4)
    steps = torch.tensor([3, 200, 600, 990])
    levels = BRIDGE.levels[steps].float()
    inputs = BRIDGE.at(levels).network_input(Flow().add_noise(x0, noise, levels))
    assert torch.allclose(inputs, Ddpm("eps").add_noise(x0, noise, steps), atol=1e-5)


def test_a_correct_eps_gives_the_correct_velocity() -> None:
    x0, noise = latents_and_noise(6)
    levels = torch.tensor([0.05, 0.3, 0.5, 0.7, 0.9, 0.93])
    flow = Flow()
    noised = flow.add_noise(x0, noise, levels)
    velocity = BRIDGE.at(levels).velocity(noise, noised)
    assert torch.allclose(velocity, flow.target(x0, noise, levels), atol=2e-5)


def test_an_error_of_eps_causes_an_error_of_the_velocity() -> None:
    x0, noise = latents_and_noise(1)
    levels = torch.tensor([0.5])
    noised = Flow().add_noise(x0, noise, levels)
    error = BRIDGE.at(levels).velocity(1.01 * noise, noised) - (noise - x0)
    assert torch.allclose(error, 0.02 * noise, atol=1e-5)  # 1/(1-s) times the error of eps


def test_the_bridge_is_continuous_at_the_end_of_the_schedule_and_finite_up_to_pure_noise() -> None:
    end = torch.tensor([BRIDGE.highest])
    below, above = BRIDGE.at(end - 1e-5), BRIDGE.at(end + 1e-5)
    for name in ("c_in", "c_out", "c_skip"):
        assert torch.allclose(getattr(below, name), getattr(above, name), rtol=1e-3)
    last = BRIDGE.at(torch.tensor([1.0]))
    assert all(bool(getattr(last, name).isfinite()) for name in ("c_in", "c_out", "c_skip", "timestep"))


def test_above_the_schedule_the_velocity_follows_from_the_clean_image() -> None:
    x0, noise = latents_and_noise(1)
    level = torch.tensor([0.98])
    coefficients = BRIDGE.at(level)
    noised = Flow().add_noise(x0, noise, level)
    alpha, sigma = 1 - BRIDGE.highest, BRIDGE.highest
    size = (alpha**2 + sigma**2) ** 0.5
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    clean = (coefficients.network_input(noised) - sigma / size * eps) / (alpha / size)
    assert torch.allclose(coefficients.velocity(eps, noised), (noised - clean) / 0.98, rtol=1e-4, atol=1e-4)


def test_a_flow_model_needs_no_scaling() -> None:
    x0, _ = latents_and_noise(2)
    levels = torch.tensor([0.2, 0.8])
    coefficients = of_flow_model(1000 * levels)
    assert torch.equal(coefficients.network_input(x0), x0)
    assert torch.equal(coefficients.velocity(x0, x0 * 3), x0)
    assert torch.equal(coefficients.timestep, Flow().timestep(levels))


def test_interpolate_starts_and_ends_at_its_arguments() -> None:
    levels = torch.tensor([0.1, 0.5, 0.97])
    first, second = BRIDGE.at(levels), of_flow_model(1000 * levels)
    for share, end in ((0.0, first), (1.0, second)):
        mixed = interpolate(first, second, share)
        for name in ("c_in", "timestep", "c_out", "c_skip"):
            assert torch.allclose(getattr(mixed, name), getattr(end, name))
    assert torch.allclose(interpolate(first, second, 0.5).c_out, (first.c_out + 1) / 2)
