"""A DDIM scheduler for schedules with zero terminal SNR."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.model.prediction import Ddpm


@dataclass(frozen=True)
class Step:
    """The result of a scheduler step, as in diffusers."""

    prev_sample: Tensor  # the latents after the step


class TerminalDdim:
    """Deterministic DDIM (Song et al. 2021, eq. 12, eta = 0) with the interface of diffusers' schedulers.

    The steps are those of Euler's method in x0 + (sigma/alpha)*noise. They are computed from alpha and sigma
    separately, because sigma/alpha is infinite at a signal-to-noise ratio of 0. Timesteps are spaced
    "trailing": the first is the last of the schedule (Lin et al. 2023, section 3.3).
    """

    init_noise_sigma = 1.0

    def __init__(self, prediction: Ddpm) -> None:
        self.prediction = prediction
        self.timesteps = torch.empty(0, dtype=torch.long)
        self._done = 0

    def set_timesteps(self, count: int, device: torch.device | str = "cpu") -> None:
        """Prepare for `count` steps."""
        last = self.prediction.steps
        shares = torch.arange(count, 0, -1, dtype=torch.float64) / count
        self.timesteps = (last * shares).round().long().to(device) - 1
        self._done = 0

    def scale_model_input(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Return the latents unchanged: DDIM needs no scaling."""
        return latents

    def step(self, output: Tensor, timestep: Tensor, latents: Tensor) -> Step:
        """Return the latents (batch, 4, h, w) at the next timestep, or the clean latents after the last."""
        times = timestep.expand(len(latents))
        x0 = self.prediction.x0(latents, output, times)
        self._done += 1
        if self._done == len(self.timesteps):
            return Step(x0)
        noise = self.prediction.noise(latents, output, times)
        following = self.timesteps[self._done].expand(len(latents))
        return Step(self.prediction.add_noise(x0, noise, following))
