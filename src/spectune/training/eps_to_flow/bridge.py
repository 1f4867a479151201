"""An EPS model read as a flow model: exact algebra, no training.

With x_flow = (1-s) x0 + s n and x_ddpm = alpha x0 + sigma n, alpha^2 + sigma^2 = 1, both are one picture at
s = sigma/(alpha+sigma), x_ddpm = (alpha+sigma) x_flow. There eps_hat = net(x_ddpm, t) and
x0_hat = (x_ddpm - sigma eps_hat)/alpha, so the velocity n - x0 is answered by

    v_hat = eps_hat - x0_hat = (eps_hat - x_flow)/(1-s),       as alpha/(alpha+sigma) = 1-s.

SDXL's schedule covers s from 0.0283 to 0.936. Beyond its ends the network is fed the last timestep; above,
where x_flow is nearly the noise itself, the velocity is (x_flow - x0_hat)/s, which stays finite.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from spectune.model.prediction import TRAIN_STEPS, alphas_cumprod


@dataclass(frozen=True)
class Reading:
    """How a network is fed and read at some noise levels; all (batch,) float32.

    velocity = c_out * net(c_in * x_flow, timestep) + c_skip * x_flow (the c of Karras et al. 2022, table 1).
    """

    c_in: Tensor
    timestep: Tensor
    c_out: Tensor
    c_skip: Tensor

    def feed(self, noised: Tensor) -> Tensor:
        """What the network is given for x_flow (batch, channels, h, w)."""
        return noised * _wide(self.c_in, noised)

    def velocity(self, output: Tensor, noised: Tensor) -> Tensor:
        """What an answer to `feed(noised)` says of the velocity, shape of `noised`."""
        return output * _wide(self.c_out, noised) + noised * _wide(self.c_skip, noised)


@dataclass(frozen=True)
class Bridge:
    """The readings of an EPS model with SDXL's schedule."""

    @cached_property
    def levels(self) -> Tensor:
        """s of each timestep 0..999, rising, float64."""
        alpha, sigma = alphas_cumprod().sqrt(), (1 - alphas_cumprod()).sqrt()
        return sigma / (alpha + sigma)

    @property
    def lowest(self) -> float:
        return float(self.levels[0])

    @property
    def highest(self) -> float:
        return float(self.levels[-1])

    def timestep(self, levels: Tensor) -> Tensor:
        """t(s), in fractions of steps; the first and the last step beyond the ends. float32, (batch,)."""
        known = self.levels
        s = levels.detach().cpu().double().clamp(known[0], known[-1])
        above = torch.searchsorted(known, s).clamp(1, TRAIN_STEPS - 1)
        share = (s - known[above - 1]) / (known[above] - known[above - 1])
        return (above - 1 + share).to(device=levels.device, dtype=torch.float32)

    def at(self, levels: Tensor) -> Reading:
        """The reading at noise levels s in 0..1, (batch,)."""
        s = levels.detach().cpu().double()  # not every device has float64
        covered = s.clamp(self.lowest, self.highest)
        size = ((1 - covered).square() + covered.square()).sqrt()  # 1/(alpha + sigma)
        alpha, sigma = (1 - covered) / size, covered / size
        beyond = s > self.highest
        c_out = torch.where(
            beyond, sigma / (alpha * s.clamp(min=self.highest)), 1 / (1 - s.clamp(max=self.highest))
        )
        c_skip = torch.where(beyond, (1 - 1 / (size * alpha)) / s.clamp(min=self.highest), -c_out)
        c_in, c_out, c_skip = (c.to(levels.device, torch.float32) for c in (1 / size, c_out, c_skip))
        return Reading(c_in, self.timestep(levels), c_out, c_skip)


def raw(levels: Tensor) -> Reading:
    """The reading of a flow model: x_flow and 1000 s in, the velocity out."""
    one = torch.ones_like(levels, dtype=torch.float32)
    return Reading(one, levels.float() * TRAIN_STEPS, one, torch.zeros_like(one))


def between(first: Reading, second: Reading, share: float) -> Reading:
    """`first` at share 0, `second` at share 1, each coefficient on the straight line between."""

    def mixed(name: str) -> Tensor:
        return torch.lerp(getattr(first, name), getattr(second, name), share)

    return replace(
        first, c_in=mixed("c_in"), timestep=mixed("timestep"), c_out=mixed("c_out"), c_skip=mixed("c_skip")
    )


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.to(device=like.device, dtype=like.dtype).view(-1, 1, 1, 1)
