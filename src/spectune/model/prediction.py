"""What the network predicts, as one record that training and sampling share.

A prediction type says how an image is noised at a time t, what the network is asked for, which
timestep it is fed and how its answer is turned back into an image. Times are a tensor of shape
(batch,): whole DDPM steps 0..999 for eps and v, the noise level s in 0..1 for flow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from spectune.errors import InputError

TRAIN_STEPS = 1000
UNSHIFTED_PIXELS = 1024 * 1024  # a picture of this size has the shift 1 by resolution
PredictionName = Literal["eps", "v", "flow"]
Shift = float | Literal["resolution"]


class Prediction(Protocol):
    """Noising, target and inverses of one prediction type; all arithmetic in float32.

    `pixels` is the area of the pictures, height * width: a flow with a shift by resolution asks for it.
    """

    @property
    def name(self) -> PredictionName: ...

    def sample_times(
        self, batch: int, generator: torch.Generator | None = None, *, pixels: int | None = None
    ) -> Tensor:
        """Random training times, shape (batch,), on the CPU."""
        ...

    def even_times(self, count: int, *, pixels: int | None = None) -> Tensor:
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

    def noise(self, noised: Tensor, output: Tensor, times: Tensor) -> Tensor:
        """The noise that `output` implies for `noised`."""
        ...

    def timestep(self, times: Tensor) -> Tensor:
        """What the UNet is fed as timestep, float32 or int64 of shape (batch,)."""
        ...

    def snr(self, times: Tensor) -> Tensor:
        """Signal-to-noise ratio of x_t, shape (batch,); 0 for pure noise, infinite for clean latents."""
        ...


@cache
def _alphas_cumprod(zero_terminal_snr: bool) -> Tensor:
    # SDXL's schedule "scaled_linear"; float64 first, because a float32 product of 1000 factors drifts.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, dim=0)
    if not zero_terminal_snr:
        return kept
    # Lin et al. 2023 (arXiv 2305.08891), algorithm 1: shift alpha so that the last is 0, stretch it so that
    # the first stays.
    alpha = kept.sqrt()
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])).square()


def kept_signal() -> Tensor:
    """alpha^2 of SDXL's timesteps 0..999, float64."""
    return _alphas_cumprod(False)


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.to(device=like.device, dtype=like.dtype).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class Ddpm:
    """Variance-preserving diffusion, x_t = alpha*x0 + sigma*noise, alpha^2 + sigma^2 = 1 (Ho et al. 2020).

    `name` is "eps" (the network predicts the noise) or "v" (alpha*noise - sigma*x0; Salimans and Ho 2022).
    With `zero_terminal_snr` the schedule is rescaled so that x_999 is pure noise (Lin et al. 2023): alpha and
    snr are 0 there. A v answer still says what the image is, an eps answer does not, so eps is trained and
    sampled on the times 0..998 and never asked for x0 at 999.
    """

    name: Literal["eps", "v"] = "eps"
    zero_terminal_snr: bool = False

    @property
    def steps(self) -> int:
        """How many times are in use, the first of them 0."""
        return TRAIN_STEPS - 1 if self.zero_terminal_snr and self.name == "eps" else TRAIN_STEPS

    def sample_times(
        self, batch: int, generator: torch.Generator | None = None, *, pixels: int | None = None
    ) -> Tensor:
        return torch.randint(self.steps, (batch,), generator=generator)

    def even_times(self, count: int, *, pixels: int | None = None) -> Tensor:
        return ((torch.arange(count) + 0.5) * self.steps / count).long()

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
            assert bool((times < self.steps).all()), "pure noise and its eps say nothing about the image"
            return (noised - sigma * output) / alpha
        return alpha * noised - sigma * output

    def noise(self, noised: Tensor, output: Tensor, times: Tensor) -> Tensor:
        if self.name == "eps":
            return output
        alpha, sigma = self._alpha_sigma(times, noised)
        return alpha * output + sigma * noised

    def timestep(self, times: Tensor) -> Tensor:
        return times

    def snr(self, times: Tensor) -> Tensor:
        kept = self._kept(times)
        return (kept / (1 - kept)).to(device=times.device, dtype=torch.float32)

    def _alpha_sigma(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        kept = self._kept(times)
        return _per_image(kept.sqrt(), like), _per_image((1 - kept).sqrt(), like)

    def _kept(self, times: Tensor) -> Tensor:
        """alpha^2, float64 on the CPU."""
        return _alphas_cumprod(self.zero_terminal_snr)[times.cpu()]


@dataclass(frozen=True)
class LogitNormal:
    """Noise levels s = sigmoid(n), n normally distributed (Esser et al. 2024, section 3.1)."""

    mean: float = 0.0
    std: float = 1.0

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.randn(batch, generator=generator))

    def quantiles(self, shares: Tensor) -> Tensor:
        """The noise levels that shares (0..1) of the samples lie below."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(shares))


@dataclass(frozen=True)
class Uniform:
    """Noise levels s uniform in 0..1."""

    def sample(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.rand(batch, generator=generator)

    def quantiles(self, shares: Tensor) -> Tensor:
        """The noise levels that shares (0..1) of the samples lie below: the shares themselves."""
        return shares


UNIFORM = Uniform()


@dataclass(frozen=True)
class Flow:
    """Rectified flow, x_s = (1-s)*x0 + s*noise; predicted is the velocity noise - x0 (Liu et al. 2022).

    Levels are drawn from `levels`, then moved towards noise by the shift r: s <- r*s / (1 + (r-1)*s) (Esser
    et al. 2024, eq. 23). With `shift` "resolution", r = sqrt(pixels / 1048576). The UNet is fed 1000*s of the
    very s in x_s, as ComfyUI's ModelSamplingSD3 does.
    """

    shift: Shift = 1.0
    levels: Uniform | LogitNormal = UNIFORM
    name: Literal["flow"] = "flow"

    def sample_times(
        self, batch: int, generator: torch.Generator | None = None, *, pixels: int | None = None
    ) -> Tensor:
        return self.shifted(self.levels.sample(batch, generator), pixels=pixels)

    def even_times(self, count: int, *, pixels: int | None = None) -> Tensor:
        return self.shifted(self.levels.quantiles((torch.arange(count) + 0.5) / count), pixels=pixels)

    def shifted(self, times: Tensor, *, pixels: int | None = None) -> Tensor:
        """Unshifted noise levels in 0..1 moved by the shift."""
        shift = self.shift_at(pixels)
        return shift * times / (1 + (shift - 1) * times)

    def shift_at(self, pixels: int | None) -> float:
        """The shift for pictures of this area; raises ValueError where it depends on an area that is None."""
        if self.shift != "resolution":
            return self.shift
        if pixels is None:
            raise ValueError("a shift by resolution needs the area of the pictures in pixels")
        return math.sqrt(pixels / UNSHIFTED_PIXELS)

    def add_noise(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        level = _per_image(times, x0)
        return (1 - level) * x0 + level * noise

    def target(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return noise - x0

    def x0(self, noised: Tensor, output: Tensor, times: Tensor) -> Tensor:
        return noised - _per_image(times, noised) * output

    def noise(self, noised: Tensor, output: Tensor, times: Tensor) -> Tensor:
        return noised + (1 - _per_image(times, noised)) * output

    def timestep(self, times: Tensor) -> Tensor:
        return times.float() * TRAIN_STEPS

    def snr(self, times: Tensor) -> Tensor:
        return ((1 - times) / times).square()


def make_prediction(
    name: str,
    *,
    flow_shift: Shift = 1.0,
    flow_levels: Uniform | LogitNormal = UNIFORM,
    zero_terminal_snr: bool = False,
) -> Prediction:
    """The prediction type called `name`: "eps", "v" or "flow".

    `flow_shift` and `flow_levels` are for flow, `zero_terminal_snr` for eps and v; the others ignore them.
    Raises InputError for any other name or a shift that is not positive.
    """
    makers: dict[str, Callable[[], Prediction]] = {
        "eps": lambda: Ddpm("eps", zero_terminal_snr),
        "v": lambda: Ddpm("v", zero_terminal_snr),
        "flow": lambda: Flow(flow_shift, flow_levels),
    }
    if name not in makers:
        raise InputError(f"unknown prediction type {name!r}: expected one of {', '.join(makers)}")
    if flow_shift != "resolution" and not flow_shift > 0:  # also NaN
        raise InputError(
            f"flow shift {flow_shift} is not positive", hint="SDXL flow models use 1 to 12; the guide 2.5"
        )
    return makers[name]()
