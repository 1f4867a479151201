"""Add noise to clean latents and compute the target of the prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spectune.model.device import send
from spectune.model.prediction import Prediction
from spectune.training.objective.pairing import optimal_order

SDXL_PIXELS_PER_LATENT = 8
Pairing = Literal["random", "optimal_transport"]


@dataclass(frozen=True)
class NoiseOptions:
    """The options that make the noise of a batch differ from independent white noise."""

    offset: float = 0.0  # standard deviation of a shift of each channel's mean
    perturbation: float = 0.0  # standard deviation of extra noise in the network's input only
    pairing: Pairing = "random"  # of the noises and the images of a batch


WHITE = NoiseOptions()


@dataclass(frozen=True)
class NoisedBatch:
    """The inputs and targets of the network, float32."""

    latents: Tensor  # noised, (batch, channels, h, w)
    timestep: Tensor  # the UNet's input, (batch,)
    target: Tensor  # (batch, channels, h, w)
    times: Tensor  # timesteps or noise levels, as the prediction type defines them, (batch,)
    snr: Tensor  # signal-to-noise ratio, (batch,)


def noise_latents(
    prediction: Prediction, x0: Tensor, noise: Tensor, times: Tensor, *, perturbation: Tensor | None = None
) -> NoisedBatch:
    """Add `noise` to clean latents `x0` at `times`.

    `perturbation` is added to the noise in x_t, but not to the target (Ning et al. 2023, alg. 1).
    """
    # float32: 16-bit values would lose the small differences between noise, x_t and target
    x0, noise = x0.float(), noise.float()
    input_noise = noise if perturbation is None else noise + perturbation.float()
    return NoisedBatch(
        latents=prediction.add_noise(x0, input_noise, times),
        timestep=prediction.timestep(times),
        target=prediction.target(x0, noise, times),
        times=times,
        snr=prediction.snr(times),
    )


def noise_at_random(
    prediction: Prediction,
    x0: Tensor,
    generator: torch.Generator,
    *,
    noise: NoiseOptions = WHITE,
    pixels_per_latent: int = SDXL_PIXELS_PER_LATENT,
) -> NoisedBatch:
    """Add random noise to `x0` (batch, channels, h, w) at random times; the same on every device.

    `pixels_per_latent` is the edge length of a latent in pixels. Noise with an offset is
    eps + offset*randn(batch, channels, 1, 1) (Guttenberg 2023, "Diffusion with offset noise").
    """
    batch, channels, height, width = x0.shape
    times = prediction.sample_times(batch, generator, pixels=height * width * pixels_per_latent**2)
    drawn = torch.randn(x0.shape, generator=generator)
    if noise.offset:
        drawn = drawn + noise.offset * torch.randn(batch, channels, 1, 1, generator=generator)
    if noise.pairing == "optimal_transport":
        drawn = drawn[optimal_order(x0, drawn)]
    perturbation = None
    if noise.perturbation:
        perturbation = send(noise.perturbation * torch.randn(x0.shape, generator=generator), x0.device)
    drawn, times = send(drawn, x0.device), send(times, x0.device)
    return noise_latents(prediction, x0, drawn, times, perturbation=perturbation)
