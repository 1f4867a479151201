"""Noising, targets and inverses against diffusers and hand-computed values."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from spectune.errors import InputError
from spectune.model.prediction import Ddpm, Flow, make_prediction

LATENTS = (5, 4, 6, 7)


@pytest.fixture
def x0() -> torch.Tensor:
    return torch.randn(LATENTS, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(LATENTS, generator=torch.Generator().manual_seed(2))


TIMES = torch.tensor([0, 17, 500, 998, 999])


def test_ddpm_noises_as_diffusers_does(x0, noise):
    oracle = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(
        Ddpm().add_noise(x0, noise, TIMES), oracle.add_noise(x0, noise, TIMES), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        Ddpm("v").target(x0, noise, TIMES), oracle.get_velocity(x0, noise, TIMES), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("prediction", "times"),
    [
        (Ddpm("eps"), TIMES),
        (Ddpm("v"), TIMES),
        (Flow(shift=2.5), torch.tensor([0.01, 0.3, 0.5, 0.936, 0.999])),
    ],
    ids=["eps", "v", "flow"],
)
def test_perfect_answer_gives_the_image_back(prediction, times, x0, noise):
    noised = prediction.add_noise(x0, noise, times)
    answer = prediction.target(x0, noise, times)
    torch.testing.assert_close(prediction.x0(noised, answer, times), x0, rtol=1e-3, atol=1e-4)
    wrong = prediction.x0(noised, answer * 1.01, times)
    assert not torch.allclose(wrong, x0, rtol=1e-3, atol=1e-4)


def test_flow_by_hand():
    one, two = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0)
    flow, level = Flow(shift=2.5), torch.tensor([0.25])
    assert flow.add_noise(one, two, level).item() == pytest.approx(0.75 * 1 + 0.25 * 3)
    assert flow.target(one, two, level).item() == 2.0
    assert flow.timestep(level).item() == 250.0
    assert flow.snr(level).item() == pytest.approx(9.0)
    # r*s/(1+(r-1)*s) at s = 1/2, r = 2.5
    assert flow.shifted(torch.tensor([0.5])).item() == pytest.approx(1.25 / 1.75)


def test_flow_shift_is_the_one_that_samplers_use():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.5)
    plain = FlowMatchEulerDiscreteScheduler(shift=1.0)
    torch.testing.assert_close(scheduler.sigmas, Flow(shift=2.5).shifted(plain.sigmas))
    torch.testing.assert_close(scheduler.timesteps, Flow(shift=2.5).timestep(scheduler.sigmas))


def test_snr_of_sdxl_schedule():
    # SDXL's last step keeps sqrt(alpha_bar) = 0.0683, its first 0.9996 (published schedule)
    snr = Ddpm().snr(torch.tensor([0, 999]))
    assert snr[0].item() == pytest.approx(0.99915 / 0.00085, rel=1e-4)
    assert snr[1].item() == pytest.approx(0.0683**2 / (1 - 0.0683**2), rel=5e-3)


def test_validation_times_are_fixed_and_spread():
    assert Ddpm().even_times(4).tolist() == [125, 375, 625, 875]
    torch.testing.assert_close(Flow().even_times(2), torch.tensor([0.25, 0.75]))


def test_flow_bridge_to_eps(x0, noise):
    """An exact eps model is a flow model at s = sigma/(alpha+sigma): v = (eps - x_flow)/(1-s)."""
    times = torch.tensor([50, 200, 500, 700, 900])
    ratio = Ddpm().snr(times).sqrt()  # alpha/sigma
    level = 1 / (1 + ratio)
    flow = Flow()
    x_flow = flow.add_noise(x0, noise, level)
    bridge = (noise - x_flow) / (1 - level.view(-1, 1, 1, 1))
    torch.testing.assert_close(bridge, flow.target(x0, noise, level), rtol=1e-4, atol=1e-4)


def test_unknown_name_and_bad_shift():
    with pytest.raises(InputError, match="unknown prediction type 'epsilon': expected one of eps, v, flow"):
        make_prediction("epsilon")
    with pytest.raises(InputError, match="flow shift -1 is not positive"):
        make_prediction("flow", flow_shift=-1)
