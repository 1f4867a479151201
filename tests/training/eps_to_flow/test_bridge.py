"""The bridge between EPS and flow: exact algebra, checked against the schedule itself."""

from __future__ import annotations

import pytest
import torch

from spectune.model.prediction import Ddpm, Flow
from spectune.training.eps_to_flow.bridge import Bridge, between, raw

BRIDGE = Bridge()


def pictures(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 4, 6, 6)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def test_the_schedule_covers_the_levels_that_are_known() -> None:
    assert BRIDGE.lowest == pytest.approx(0.0283, abs=1e-4)
    assert BRIDGE.highest == pytest.approx(0.936, abs=1e-3)


def test_the_timestep_of_a_level_is_the_inverse_of_the_schedule() -> None:
    steps = torch.tensor([0, 1, 250, 700, 999])
    assert torch.allclose(BRIDGE.timestep(BRIDGE.levels[steps]), steps.float(), atol=1e-3)
    assert BRIDGE.timestep(torch.tensor([0.0, 1.0])).tolist() == [0.0, 999.0]
    middle = BRIDGE.timestep((BRIDGE.levels[10:11] + BRIDGE.levels[11:12]) / 2)
    assert 10 < float(middle) < 11


def test_the_network_is_fed_the_picture_as_its_own_schedule_noises_it() -> None:
    x0, noise = pictures(4)
    steps = torch.tensor([3, 200, 600, 990])
    levels = BRIDGE.levels[steps].float()
    fed = BRIDGE.at(levels).feed(Flow().add_noise(x0, noise, levels))
    assert torch.allclose(fed, Ddpm("eps").add_noise(x0, noise, steps), atol=1e-5)


def test_an_eps_model_that_is_right_is_a_flow_model_that_is_right() -> None:
    x0, noise = pictures(6)
    levels = torch.tensor([0.05, 0.3, 0.5, 0.7, 0.9, 0.93])
    flow = Flow()
    noised = flow.add_noise(x0, noise, levels)
    velocity = BRIDGE.at(levels).velocity(noise, noised)
    assert torch.allclose(velocity, flow.target(x0, noise, levels), atol=2e-5)


def test_a_wrong_eps_is_a_wrong_velocity() -> None:
    x0, noise = pictures(1)
    levels = torch.tensor([0.5])
    noised = Flow().add_noise(x0, noise, levels)
    error = BRIDGE.at(levels).velocity(1.01 * noise, noised) - (noise - x0)
    assert torch.allclose(error, 0.02 * noise, atol=1e-5)  # 1/(1-s) times the error of eps


def test_the_reading_is_continuous_where_the_schedule_ends_and_finite_up_to_pure_noise() -> None:
    end = torch.tensor([BRIDGE.highest])
    below, above = BRIDGE.at(end - 1e-5), BRIDGE.at(end + 1e-5)
    for name in ("c_in", "c_out", "c_skip"):
        assert torch.allclose(getattr(below, name), getattr(above, name), rtol=1e-3)
    last = BRIDGE.at(torch.tensor([1.0]))
    assert all(bool(getattr(last, name).isfinite()) for name in ("c_in", "c_out", "c_skip", "timestep"))


def test_above_the_end_the_velocity_follows_from_the_clean_picture() -> None:
    x0, noise = pictures(1)
    level = torch.tensor([0.98])
    reading = BRIDGE.at(level)
    noised = Flow().add_noise(x0, noise, level)
    alpha, sigma = 1 - BRIDGE.highest, BRIDGE.highest
    size = (alpha**2 + sigma**2) ** 0.5
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    clean = (reading.feed(noised) - sigma / size * eps) / (alpha / size)
    assert torch.allclose(reading.velocity(eps, noised), (noised - clean) / 0.98, rtol=1e-4, atol=1e-4)


def test_raw_reads_what_a_flow_model_answers() -> None:
    x0, _ = pictures(2)
    levels = torch.tensor([0.2, 0.8])
    reading = raw(levels)
    assert torch.equal(reading.feed(x0), x0)
    assert torch.equal(reading.velocity(x0, x0 * 3), x0)
    assert torch.equal(reading.timestep, Flow().timestep(levels))


def test_between_begins_and_ends_at_its_two_readings() -> None:
    levels = torch.tensor([0.1, 0.5, 0.97])
    first, second = BRIDGE.at(levels), raw(levels)
    for share, end in ((0.0, first), (1.0, second)):
        found = between(first, second, share)
        for name in ("c_in", "timestep", "c_out", "c_skip"):
            assert torch.allclose(getattr(found, name), getattr(end, name))
    assert torch.allclose(between(first, second, 0.5).c_out, (first.c_out + 1) / 2)
