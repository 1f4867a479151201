"""Prediction types: noising, the target of the network, and the clean latents that its output implies.

Training and sampling share these records. With noised latents x_t, noise n and the UNet F, in the notation
of Karras et al. 2022 (arXiv 2206.00364, eq. 7), x0 = c_skip x_t + c_out F(c_in x_t, c_noise):

    type  x_t                 target F            c_skip   c_out         c_in  c_noise
    eps   alpha x0 + sigma n  n                   1/alpha  -sigma/alpha  1     t
    v     alpha x0 + sigma n  alpha n - sigma x0  alpha    -sigma        1     t
    flow  (1-s) x0 + s n      n - x0              1        -s            1     1000 s

Times are a tensor of shape (batch,): DDPM steps t in 0..999 for eps and v, noise levels s in 0..1 for flow.
`pixels` is the area of an image, height * width. Only flow with a shift by resolution needs it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from spectune.errors import InputError
from spectune.model.noise_levels import UNIFORM, NoiseLevels

TRAIN_STEPS = 1000
UNSHIFTED_PIXELS = 1024 * 1024  # the image area where the shift by resolution is 1
SMALLEST_SHARE = 1e-6  # of the noise levels that limits may leave
Shift = float | Literal["resolution"]
Timesteps = Literal["continuous", "integer"]


@cache
def _alphas_cumprod(zero_terminal_snr: bool) -> Tensor:
    # SDXL's "scaled_linear" schedule; float64: a product of 1000 float32 factors loses precision
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    alpha_squared = torch.cumprod(1 - betas, dim=0)
    if not zero_terminal_snr:
        return alpha_squared
    # Lin et al. 2023 (arXiv 2305.08891), algorithm 1: shift alpha to end at 0, rescale it to keep alpha[0]
    alpha = alpha_squared.sqrt()
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])).square()


@cache
def _alphas_cumprod_on(device: torch.device, zero_terminal_snr: bool) -> Tensor:
    """Return the table on a device: reading times from a GPU would wait for it in every step."""
    return _alphas_cumprod(zero_terminal_snr).to(device)


def alphas_cumprod(*, zero_terminal_snr: bool = False) -> Tensor:
    """Return alpha^2 of SDXL's timesteps 0..999, float64."""
    return _alphas_cumprod(zero_terminal_snr)


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.to(device=like.device, dtype=like.dtype).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class Ddpm:
    """Variance-preserving diffusion, x_t = alpha*x0 + sigma*noise, alpha^2 + sigma^2 = 1 (Ho et al. 2020).

    `name` is "eps" (the network predicts the noise) or "v" (alpha*noise - sigma*x0; Salimans and Ho 2022).
    With `zero_terminal_snr`, the schedule is rescaled (Lin et al. 2023): x_999 is pure noise, so alpha and
    snr are 0 there. A v prediction at 999 still determines x0, but an eps prediction does not. Therefore eps
    uses only the times 0..998, in training and sampling, and `x0` fails at 999.
    """

    name: Literal["eps", "v"] = "eps"
    zero_terminal_snr: bool = False

    @property
    def steps(self) -> int:
        """The number of times: they are 0..steps-1."""
        return TRAIN_STEPS - 1 if self.zero_terminal_snr and self.name == "eps" else TRAIN_STEPS

    def sample_times(
        self, batch: int, generator: torch.Generator | None = None, *, pixels: int | None = None
    ) -> Tensor:
        """Draw random training times, shape (batch,), on the CPU."""
        return torch.randint(self.steps, (batch,), generator=generator)

    def even_times(self, count: int, *, pixels: int | None = None) -> Tensor:
        """Return `count` fixed times, spread evenly over the training distribution, for validation."""
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
        """Return the clean latents implied by `output`: c_skip * noised + c_out * output."""
        alpha, sigma = self._alpha_sigma(times, noised)
        if self.name == "eps":
            assert bool((times < self.steps).all()), "eps does not determine x0 at pure noise"
            return (noised - sigma * output) / alpha
        return alpha * noised - sigma * output

    def noise(self, noised: Tensor, output: Tensor, times: Tensor) -> Tensor:
        """Return the noise implied by `output`."""
        if self.name == "eps":
            return output
        alpha, sigma = self._alpha_sigma(times, noised)
        return alpha * output + sigma * noised

    def timestep(self, times: Tensor) -> Tensor:
        """Return the timestep input of the UNet (c_noise), shape (batch,)."""
        return times

    def snr(self, times: Tensor) -> Tensor:
        """Return the signal-to-noise ratio of x_t, shape (batch,): 0 for pure noise, infinite for x0."""
        alpha_squared = self._alpha_squared(times)
        return (alpha_squared / (1 - alpha_squared)).to(device=times.device, dtype=torch.float32)

    def _alpha_sigma(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha_squared = self._alpha_squared(times)
        return _per_image(alpha_squared.sqrt(), like), _per_image((1 - alpha_squared).sqrt(), like)

    def _alpha_squared(self, times: Tensor) -> Tensor:
        """Return alpha^2 in float64."""
        if times.device.type == "mps":  # it has no float64
            times = times.cpu()
        return _alphas_cumprod_on(times.device, self.zero_terminal_snr)[times]


@dataclass(frozen=True)
class Flow:
    """Rectified flow, x_s = (1-s)*x0 + s*noise; the network predicts noise - x0 (Liu et al. 2022).

    Noise levels are drawn from `levels`, then moved towards noise by the shift r: s <- r*s / (1 + (r-1)*s)
    (Esser et al. 2024, eq. 23). With `shift` "resolution", r = sqrt(pixels / 1048576). `lowest` and `highest`
    limit the noise levels after the shift, as the network sees them: the distribution is that of the levels
    between them. The timestep input is 1000*s, as in ComfyUI's ModelSamplingSD3. With `timesteps` "integer",
    it is the whole number below, 0..999, as in public trainers.
    """

    shift: Shift = 1.0
    levels: NoiseLevels = UNIFORM
    name: Literal["flow"] = "flow"
    lowest: float = 0.0
    highest: float = 1.0
    timesteps: Timesteps = "continuous"

    def sample_times(
        self, batch: int, generator: torch.Generator | None = None, *, pixels: int | None = None
    ) -> Tensor:
        if self._is_unlimited:
            return self.shifted(self.levels.sample(batch, generator), pixels=pixels)
        return self._limited(torch.rand(batch, generator=generator), pixels)

    def even_times(self, count: int, *, pixels: int | None = None) -> Tensor:
        shares = (torch.arange(count) + 0.5) / count
        if self._is_unlimited:
            return self.shifted(self.levels.quantiles(shares), pixels=pixels)
        return self._limited(shares, pixels)

    @property
    def _is_unlimited(self) -> bool:
        return (self.lowest, self.highest) == (0.0, 1.0)

    def _limited(self, shares: Tensor, pixels: int | None) -> Tensor:
        """Return the quantiles of the distribution between the limits, (batch,) float32."""
        below, above = self.shares_of_limits(pixels)
        levels = self.levels.quantiles(below + (above - below) * shares.double())
        # the clamp only removes the rounding of the shift
        return self.shifted(levels, pixels=pixels).clamp(self.lowest, self.highest).float()

    def shares_of_limits(self, pixels: int | None = None) -> tuple[float, float]:
        """Return the shares of all noise levels below `lowest` and below `highest`.

        Raises:
            InputError: Almost no noise levels are between the limits.
        """
        shift = self.shift_at(pixels)
        limits = torch.tensor([self.lowest, self.highest], dtype=torch.float64)
        below, above = self.levels.share_below(limits / (shift - (shift - 1) * limits)).tolist()
        if not above - below >= SMALLEST_SHARE:
            raise InputError(
                f"a share of only {above - below:.1g} of the noise levels is between {self.lowest:g} and "
                f"{self.highest:g}",
                hint="widen `flow_times_min` and `flow_times_max`, or change the distribution",
            )
        return below, above

    def shifted(self, times: Tensor, *, pixels: int | None = None) -> Tensor:
        """Apply the shift to noise levels in 0..1."""
        shift = self.shift_at(pixels)
        return shift * times / (1 + (shift - 1) * times)

    def shift_at(self, pixels: int | None) -> float:
        """Return the shift for an image area; raise ValueError if it needs the area and `pixels` is None."""
        if self.shift != "resolution":
            return self.shift
        if pixels is None:
            raise ValueError("a shift by resolution needs the image area in pixels")
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
        exact = times.float() * TRAIN_STEPS
        return exact if self.timesteps == "continuous" else exact.floor().clamp(max=TRAIN_STEPS - 1)

    def snr(self, times: Tensor) -> Tensor:
        return ((1 - times) / times).square()


Prediction = Ddpm | Flow


def make_prediction(
    name: str,
    *,
    flow_shift: Shift = 1.0,
    flow_levels: NoiseLevels = UNIFORM,
    zero_terminal_snr: bool = False,
) -> Prediction:
    """Return the prediction type called `name`: "eps", "v" or "flow".

    Only flow uses `flow_shift` and `flow_levels`; only eps and v use `zero_terminal_snr`.

    Raises:
        InputError: The name is unknown, or the shift is not positive.
    """
    if name not in ("eps", "v", "flow"):
        raise InputError(f"unknown prediction type {name!r}: expected one of eps, v, flow")
    if flow_shift != "resolution" and not flow_shift > 0:  # also NaN
        raise InputError(
            f"flow shift {flow_shift} is not positive",
            hint="SDXL flow models use shifts of 1 to 12; the guide uses 2.5",
        )
    return Flow(flow_shift, flow_levels) if name == "flow" else Ddpm(name, zero_terminal_snr)
