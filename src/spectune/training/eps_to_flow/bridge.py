"""The bridge: use an EPS or v model as a flow model, by exact algebra and without training.

Let x_flow = (1-s) x0 + s n and x_ddpm = alpha x0 + sigma n with alpha^2 + sigma^2 = 1. At
s = sigma/(alpha+sigma), both are the same image up to a factor: x_ddpm = (alpha+sigma) x_flow. The network
gives eps_hat = net(x_ddpm, t) and x0_hat = (x_ddpm - sigma eps_hat)/alpha. The velocity n - x0 follows:

    v_hat = eps_hat - x0_hat = (eps_hat - x_flow)/(1-s),       because alpha/(alpha+sigma) = 1-s.

A v model gives n_hat = sigma x_ddpm + alpha net and x0_hat = alpha x_ddpm - sigma net, so

    v_hat = (alpha+sigma) net(x_ddpm, t) + (sigma-alpha) x_ddpm.

The error of the velocity is c_out times the error of the network: 1/(1-s) for EPS, alpha+sigma for v.

SDXL's schedule covers s from 0.0283 to 0.936, with zero terminal SNR to 1. Outside of this range, an EPS
network gets the first or the last timestep. Above it, x_flow is almost pure noise, and the velocity is
computed as (x_flow - x0_hat)/s, which stays finite. Between two timesteps, t is interpolated: networks accept
fractions.

Diff2Flow (arXiv 2506.02221) aligns timesteps and inputs of diffusion and flow models in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from spectune.model.prediction import TRAIN_STEPS, Ddpm, alphas_cumprod

EPS = Ddpm("eps")


@dataclass(frozen=True)
class Preconditioning:
    """The coefficients that turn a network into a predictor of the velocity; all (batch,) float32.

    velocity = c_out * net(c_in * x_flow, timestep) + c_skip * x_flow (names: Karras et al. 2022, table 1)
    """

    c_in: Tensor
    timestep: Tensor
    c_out: Tensor
    c_skip: Tensor

    def network_input(self, x_flow: Tensor) -> Tensor:
        """Return c_in * x_flow, (batch, channels, h, w)."""
        return x_flow * _per_image(self.c_in, x_flow)

    def velocity(self, output: Tensor, x_flow: Tensor) -> Tensor:
        """Return the velocity, with the shape of `x_flow`, from the output for `network_input(x_flow)`."""
        return output * _per_image(self.c_out, x_flow) + x_flow * _per_image(self.c_skip, x_flow)


@dataclass(frozen=True)
class Bridge:
    """The bridge for an EPS or v model with the noise schedule of `prediction`.

    For v, noise levels must be between `lowest` and `highest`; for EPS, others are extrapolated.
    """

    prediction: Ddpm = EPS

    @cached_property
    def levels(self) -> Tensor:
        """The noise level s of each timestep 0..999, increasing, float64."""
        alpha_squared = alphas_cumprod(zero_terminal_snr=self.prediction.zero_terminal_snr)
        alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
        return sigma / (alpha + sigma)

    @property
    def lowest(self) -> float:
        """The noise level s of the first timestep."""
        return float(self.levels[0])

    @property
    def highest(self) -> float:
        """The noise level s of the last timestep."""
        return float(self.levels[-1])

    def timestep(self, levels: Tensor) -> Tensor:
        """Return t(s), interpolated and clamped to the first and last timestep; float32, (batch,)."""
        schedule = self.levels
        s = levels.detach().cpu().double().clamp(schedule[0], schedule[-1])
        above = torch.searchsorted(schedule, s).clamp(1, TRAIN_STEPS - 1)
        share = (s - schedule[above - 1]) / (schedule[above] - schedule[above - 1])
        return (above - 1 + share).to(device=levels.device, dtype=torch.float32)

    def at(self, levels: Tensor) -> Preconditioning:
        """Return the preconditioning at noise levels s in 0..1, (batch,)."""
        s = levels.detach().cpu().double()  # not every device has float64
        covered = s.clamp(self.lowest, self.highest)
        size = ((1 - covered).square() + covered.square()).sqrt()  # 1/(alpha + sigma)
        alpha, sigma = (1 - covered) / size, covered / size
        if self.prediction.name == "v":
            return self._preconditioning(levels, 1 / size, alpha + sigma, sigma.square() - alpha.square())
        beyond = s > self.highest
        c_out = torch.where(
            beyond, sigma / (alpha * s.clamp(min=self.highest)), 1 / (1 - s.clamp(max=self.highest))
        )
        c_skip = torch.where(beyond, (1 - 1 / (size * alpha)) / s.clamp(min=self.highest), -c_out)
        return self._preconditioning(levels, 1 / size, c_out, c_skip)

    def _preconditioning(self, levels: Tensor, *coefficients: Tensor) -> Preconditioning:
        c_in, c_out, c_skip = (c.to(levels.device, torch.float32) for c in coefficients)
        return Preconditioning(c_in, self.timestep(levels), c_out, c_skip)


def of_flow_model(timestep: Tensor) -> Preconditioning:
    """Return the preconditioning of a flow model: inputs x_flow and `timestep`, output the velocity."""
    one = torch.ones_like(timestep, dtype=torch.float32)
    return Preconditioning(one, timestep, one, torch.zeros_like(one))


def interpolate(first: Preconditioning, second: Preconditioning, share: float) -> Preconditioning:
    """Interpolate all coefficients linearly: `first` at share 0, `second` at share 1."""
    return Preconditioning(
        c_in=torch.lerp(first.c_in, second.c_in, share),
        timestep=torch.lerp(first.timestep, second.timestep, share),
        c_out=torch.lerp(first.c_out, second.c_out, share),
        c_skip=torch.lerp(first.c_skip, second.c_skip, share),
    )


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.to(device=like.device, dtype=like.dtype).view(-1, 1, 1, 1)
