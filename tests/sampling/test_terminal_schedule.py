"""Sampling from pure noise against the schedulers of diffusers and against the image itself."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from spectune.errors import InputError
from spectune.model.prediction import Ddpm, Flow
from spectune.sampling.generate import make_scheduler
from spectune.sampling.terminal_schedule import TerminalDdim

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
    """Some smooth function of latents and timestep."""
    return torch.sin(1.7 * noised + timestep / 300) - 0.3 * noised


def drawn(scheduler, steps: int) -> torch.Tensor:
    """What a scheduler makes of fixed noise."""
    scheduler.set_timesteps(steps)
    noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    latents = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = network(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(output, timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize("steps", [1, 4, 20, 50])
def test_ddim_is_the_one_of_diffusers(steps):
    # step counts that divide 1000: of others, diffusers takes the step before from 1000 // steps
    oracle = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, **SDXL)
    found = drawn(TerminalDdim(V), steps)
    torch.testing.assert_close(found, drawn(oracle, steps), rtol=0, atol=5e-5)
    assert not torch.allclose(found, drawn(TerminalDdim(Ddpm("v")), steps), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("steps", [4, 7, 30])
def test_ddim_is_eulers_method_of_diffusers(steps):
    # diffusers begins Euler at alpha^2 = 2^-24, its stand-in for 0
    torch.testing.assert_close(
        drawn(TerminalDdim(V), steps), drawn(EulerDiscreteScheduler(**SDXL), steps), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("steps", [1, 7, 25, 30, 33])
def test_timesteps_begin_with_pure_noise_and_are_those_of_diffusers(steps):
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
    for _ in range(2):  # a scheduler can be used again
        scheduler.set_timesteps(9)
        latents = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        for timestep in scheduler.timesteps:
            times = timestep.view(1)
            # the noise that would have made these latents out of x0
            signal, level = prediction.add_noise(x0, zero, times), prediction.add_noise(zero, one, times)
            answer = prediction.target(x0, (latents - signal) / level, times)
            latents = scheduler.step(answer, timestep, latents).prev_sample
        torch.testing.assert_close(latents, x0, rtol=0, atol=1e-4)


def test_other_samplers_are_refused_by_name():
    with pytest.raises(InputError, match="no sampler 'dpmpp_2m' for zero-terminal-SNR v models") as caught:
        make_scheduler(V, "dpmpp_2m")
    assert caught.value.hint == "choose one of euler, ddim"


def test_a_shift_by_resolution_is_that_of_the_picture():
    scheduler = make_scheduler(Flow("resolution"), "euler", pixels=2048 * 2048)
    assert scheduler.shift == 2.0
