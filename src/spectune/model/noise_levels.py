"""Distributions of the noise levels of flow in training, before the shift.

To add a distribution, write the class and add a row to `DISTRIBUTIONS`. The recipe has a key
`flow_times_NAME` for each parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.extras import extras_named

BISECTIONS = 48  # halve 0..1 until the error is far below float32's rounding


class NoiseLevels:
    """A distribution of noise levels s in 0..1."""

    def share_below(self, levels: Tensor) -> Tensor:
        """Return the share (0..1) of all samples below each noise level; inverse: quantiles."""
        raise NotImplementedError

    def quantiles(self, shares: Tensor) -> Tensor:
        """Return the noise levels below which these shares (0..1) of all samples lie."""
        raise NotImplementedError

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw random noise levels, (batch,) float32, on the CPU."""
        return self.quantiles(torch.rand(batch, generator=generator))


@dataclass(frozen=True)
class Uniform(NoiseLevels):
    """A uniform distribution of noise levels s in 0..1."""

    def share_below(self, levels: Tensor) -> Tensor:
        return levels

    def quantiles(self, shares: Tensor) -> Tensor:
        return shares


@dataclass(frozen=True)
class LogitNormal(NoiseLevels):
    """A distribution of noise levels s = sigmoid(n) with normal n (Esser et al. 2024, section 3.1)."""

    mean: float = 0.0
    std: float = 1.0

    def share_below(self, levels: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(levels) - self.mean) / self.std)

    def quantiles(self, shares: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(shares))

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.randn(batch, generator=generator))


@dataclass(frozen=True)
class Beta(NoiseLevels):
    """A beta distribution of noise levels, with a density proportional to s^(alpha-1) (1-s)^(beta-1).

    The density rises towards noise if alpha > beta. alpha = beta = 1 is the uniform distribution.
    """

    alpha: float = 1.0
    beta: float = 1.0

    @extras_named("a beta distribution of noise levels")
    def share_below(self, levels: Tensor) -> Tensor:
        from scipy.special import betainc

        return torch.from_numpy(betainc(self.alpha, self.beta, levels.double().numpy())).to(levels.dtype)

    @extras_named("a beta distribution of noise levels")
    def quantiles(self, shares: Tensor) -> Tensor:
        from scipy.special import betaincinv

        return torch.from_numpy(betaincinv(self.alpha, self.beta, shares.double().numpy())).to(shares.dtype)


@dataclass(frozen=True)
class Mixed(NoiseLevels):
    """A mixture: a noise level is uniform with the probability `uniform_share`, else drawn from `levels`."""

    levels: NoiseLevels
    uniform_share: float

    def share_below(self, levels: Tensor) -> Tensor:
        return self.uniform_share * levels + (1 - self.uniform_share) * self.levels.share_below(levels)

    def quantiles(self, shares: Tensor) -> Tensor:
        wanted = shares.double()
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            is_above = self.share_below(middle) < wanted
            low, high = torch.where(is_above, middle, low), torch.where(is_above, high, middle)
        return high.to(shares.dtype)


@dataclass(frozen=True)
class Distribution:
    """A distribution with the facts that the recipe and the documentation need."""

    make: Callable[..., NoiseLevels]
    parameters: tuple[str, ...]  # keyword arguments of `make`
    formula: str
    source: str


UNIFORM = Uniform()
DISTRIBUTIONS: dict[str, Distribution] = {
    "uniform": Distribution(Uniform, (), "s ~ U(0, 1)", "Liu et al. 2022"),
    "logit_normal": Distribution(
        LogitNormal, ("mean", "std"), "s = sigmoid(n), n ~ N(mean, std^2)", "Esser et al. 2024, section 3.1"
    ),
    "beta": Distribution(Beta, ("alpha", "beta"), "density ~ s^(alpha-1) (1-s)^(beta-1)", "standard"),
}


def make_levels(name: str, parameters: dict[str, float], *, uniform_share: float = 0.0) -> NoiseLevels:
    """Return the distribution called `name`, mixed with a uniform share."""
    levels = DISTRIBUTIONS[name].make(**parameters)
    return Mixed(levels, uniform_share) if uniform_share else levels
