"""Sampling from pure noise, compared with the schedulers of diffusers and with the image itself."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from spectune.errors import InputError
from spectune.model.prediction import Ddpm, Flow
from spectune.sampling.generate import make_scheduler
from spectune.sampling.terminal_ddim import TerminalDdim

V = Ddpm("v", zero_terminal_snr=True)
SDXL = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def network(noised: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Return a smooth function of latents and timestep."""
    return torch.sin(1.7 * noised + timestep / 300) - 0.3 * noised


def sample(scheduler, steps: int) -> torch.Tensor:
    """Run a scheduler on fixed noise."""
    scheduler.set_timesteps(steps)
    noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    latents = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = network(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(output, timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize("steps", [1, 4, 20, 50])
def test_ddim_matches_diffusers(steps):
    # only step counts that divide 1000: for others, diffusers computes the previous step with 1000 // steps
    oracle = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, **SDXL)
    latents = sample(TerminalDdim(V), steps)
    torch.testing.assert_close(latents, sample(oracle, steps), rtol=0, atol=5e-5)
    assert not torch.allclose(latents, sample(TerminalDdim(Ddpm("v")), steps), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("steps", [4, 7, 30])
def test_ddim_matches_eulers_method_of_diffusers(steps):
    # diffusers starts Euler at alpha^2 = 2^-24 instead of 0
    torch.testing.assert_close(
        sample(TerminalDdim(V), steps), sample(EulerDiscreteScheduler(**SDXL), steps), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("steps", [1, 7, 25, 30, 33])
def test_timesteps_start_at_pure_noise_and_match_diffusers(steps):
    scheduler, oracle = TerminalDdim(V), EulerDiscreteScheduler(**SDXL)
    scheduler.set_timesteps(steps)
    oracle.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == oracle.timesteps.tolist()
    assert scheduler.timesteps[0].item() == 999
    eps = TerminalDdim(Ddpm("eps", zero_terminal_snr=True))
    eps.set_timesteps(steps)
    assert eps.timesteps[0].item() == 998


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
@pytest.mark.parametrize("name", ["v", "eps"])
def test_a_perfect_network_is_sampled_to_its_image(sampler, name):
    prediction = Ddpm(name, zero_terminal_snr=True)
    scheduler = make_scheduler(prediction, sampler)
    x0 = torch.full((1, 4, 2, 2), 0.7)
    zero, one = torch.zeros_like(x0), torch.ones_like(x0)
    for _ in range(2):  # a scheduler is reusable
        scheduler.set_timesteps(9)
        latents = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        for timestep in scheduler.timesteps:
            times = timestep.view(1)
            # the noise that turns x0 into these latents
            signal, level = prediction.add_noise(x0, zero, times), prediction.add_noise(zero, one, times)
            output = prediction.target(x0, (latents - signal) / level, times)
            latents = scheduler.step(output, timestep, latents).prev_sample
        torch.testing.assert_close(latents, x0, rtol=0, atol=1e-4)


def test_other_samplers_are_an_error():
    with pytest.raises(InputError, match="no sampler 'dpmpp_2m' for zero-terminal-SNR v models") as caught:
        make_scheduler(V, "dpmpp_2m")
    assert caught.value.hint == "choose one of euler, ddim"


def test_a_shift_by_resolution_follows_the_picture_size():
    scheduler = make_scheduler(Flow("resolution"), "euler", pixels=2048 * 2048)
    assert scheduler.shift == 2.0
