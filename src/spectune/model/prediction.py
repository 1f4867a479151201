"""What the network predicts, as one record that training and sampling share.

A prediction type says how an image is noised at a time t, what the network is asked for, which
timestep it is fed and how its answer is turned back into an image. Times are a tensor of shape
(batch,): whole DDPM steps 0..999 for eps and v, the noise level s in 0..1 for flow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from spectune.errors import InputError

TRAIN_STEPS = 1000
PredictionName = Literal["eps", "v", "flow"]


class Prediction(Protocol):
    """Noising, target and inverse of one prediction type; all arithmetic in float32."""

    @property
    def name(self) -> PredictionName: ...

    def sample_times(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Random training times, shape (batch,), on the CPU."""
        ...

    def even_times(self, count: int) -> Tensor:
        """`count` fixed times that cover the training distribution evenly, for validation."""
        ...

    def add_noise(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The noised latents x_t, shape of `x0`."""
        ...

    def target(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the network should answer for x_t."""
        ...

    def x0(self, noised: Tensor, output: Tensor, times: Tensor) -> Tensor:
        """The clean latents that `output` implies for `noised`."""
        ...

    def timestep(self, times: Tensor) -> Tensor:
        """What the UNet is fed as timestep, float32 or int64 of shape (batch,)."""
        ...

    def snr(self, times: Tensor) -> Tensor:
        """Signal-to-noise ratio of x_t, shape (batch,)."""
        ...


@cache
def _alphas_cumprod() -> Tensor:
    # SDXL's schedule "scaled_linear"; float64 first, because a float32 product of 1000 factors drifts.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.to(device=like.device, dtype=like.dtype).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class Ddpm:
    """Variance-preserving diffusion, x_t = alpha*x0 + sigma*noise, alpha^2 + sigma^2 = 1 (Ho et al. 2020).

    `name` is "eps" (the network predicts the noise) or "v" (alpha*noise - sigma*x0; Salimans and Ho 2022).
    """

    name: Literal["eps", "v"] = "eps"

    def sample_times(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randint(TRAIN_STEPS, (batch,), generator=generator)

    def even_times(self, count: int) -> Tensor:
        return ((torch.arange(count) + 0.5) * TRAIN_STEPS / count).long()

    def add_noise(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        alpha, sigma = self._alpha_sigma(times, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        if self.name == "eps":
            return noise
        alpha, sigma = self._alpha_sigma(times, x0)
        return alpha * noise - sigma * x0

    def x0(self, noised: Tensor, output: Tensor, times: Tensor) -> Tensor:
        alpha, sigma = self._alpha_sigma(times, noised)
        if self.name == "eps":
            return (noised - sigma * output) / alpha
        return alpha * noised - sigma * output

    def timestep(self, times: Tensor) -> Tensor:
        return times

    def snr(self, times: Tensor) -> Tensor:
        ratio = _alphas_cumprod()[times.cpu()]
        return (ratio / (1 - ratio)).to(device=times.device, dtype=torch.float32)

    def _alpha_sigma(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        kept = _alphas_cumprod()[times.cpu()]
        return _per_image(kept.sqrt(), like), _per_image((1 - kept).sqrt(), like)


@dataclass(frozen=True)
class Flow:
    """Rectified flow, x_s = (1-s)*x0 + s*noise; predicted is the velocity noise - x0 (Liu et al. 2022).

    Times are uniform, then moved towards noise by `shift`: s <- r*s / (1 + (r-1)*s) (Esser et al. 2024,
    eq. 23). The UNet is fed 1000*s of the very s in x_s, as ComfyUI's ModelSamplingSD3 does.
    """

    shift: float = 1.0
    name: Literal["flow"] = "flow"

    def sample_times(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        return self.shifted(torch.rand(batch, generator=generator))

    def even_times(self, count: int) -> Tensor:
        return self.shifted((torch.arange(count) + 0.5) / count)

    def shifted(self, times: Tensor) -> Tensor:
        """Unshifted noise levels in 0..1 moved by the shift."""
        return self.shift * times / (1 + (self.shift - 1) * times)

    def add_noise(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        level = _per_image(times, x0)
        return (1 - level) * x0 + level * noise

    def target(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return noise - x0

    def x0(self, noised: Tensor, output: Tensor, times: Tensor) -> Tensor:
        return noised - _per_image(times, noised) * output

    def timestep(self, times: Tensor) -> Tensor:
        return times.float() * TRAIN_STEPS

    def snr(self, times: Tensor) -> Tensor:
        return ((1 - times) / times).square()


def make_prediction(name: str, *, flow_shift: float = 1.0) -> Prediction:
    """The prediction type called `name`: "eps", "v" or "flow" (with its shift).

    Raises InputError for any other name or a shift that is not positive.
    """
    makers: dict[str, Callable[[], Prediction]] = {
        "eps": lambda: Ddpm("eps"),
        "v": lambda: Ddpm("v"),
        "flow": lambda: Flow(shift=flow_shift),
    }
    if name not in makers:
        raise InputError(f"unknown prediction type {name!r}: expected one of {', '.join(makers)}")
    if not flow_shift > 0:  # also NaN
        raise InputError(
            f"flow shift {flow_shift} is not positive", hint="SDXL flow models use 1 to 12; the guide 2.5"
        )
    return makers[name]()
