"""What a wrong answer costs. Each loss maps (answer, target), both (batch, channels, h, w) float32, to costs
of the same leading axis; the mean over all other axes is the cost of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

HUBER_C = 0.1  # of the papers' and kohya's
HIGH_GAIN = 4.0  # an error at the Nyquist frequency weighs 1 + HIGH_GAIN times as much as one of the mean
POOLINGS = (1, 2, 4)  # edges in latents of what multiscale averages over
HuberSchedule = Literal["constant", "snr"]


@dataclass(frozen=True)
class Loss:
    """A loss, and where a mask comes in.

    Masks (batch, 1, h, w) of 0..1 multiply the cost of each element. Losses that mix elements see masked
    answers and targets instead: behind a Fourier transform or an average there is nothing left to mask.
    """

    cost: Callable[..., Tensor]
    mixes_elements: bool = False
    has_turn: bool = False  # takes the distance c as well, a number or (batch,)

    def __call__(
        self,
        answer: Tensor,
        target: Tensor,
        *,
        mask: Tensor | None = None,
        turn: float | Tensor = HUBER_C,
    ) -> Tensor:
        # float32: squares and Fourier sums of 16-bit numbers lose the small errors
        answer, target = answer.float(), target.float()
        if mask is not None and self.mixes_elements:
            answer, target = answer * mask, target * mask
        costs = self.cost(answer, target, turn) if self.has_turn else self.cost(answer, target)
        return costs if mask is None or self.mixes_elements else costs * mask


def mse(answer: Tensor, target: Tensor) -> Tensor:
    """(answer - target)^2, elementwise (Ho et al. 2020, eq. 14)."""
    return (answer - target).square()


def l1(answer: Tensor, target: Tensor) -> Tensor:
    """|answer - target|, elementwise."""
    return (answer - target).abs()


def huber(answer: Tensor, target: Tensor, c: float | Tensor) -> Tensor:
    """2c (sqrt(d^2 + c^2) - c) for the difference d: d^2 near 0, 2c|d| beyond c.

    The pseudo-Huber loss (Charbonnier et al. 1997) in the scale of kohya-ss/sd-scripts.
    """
    return _turned(c, answer) * smooth_l1(answer, target, c)


def smooth_l1(answer: Tensor, target: Tensor, c: float | Tensor) -> Tensor:
    """2 (sqrt(d^2 + c^2) - c) for the difference d: d^2/c near 0, 2|d| beyond c (as kohya has it)."""
    squared, c = (answer - target).square(), _turned(c, answer)
    # the same number without the difference of two near ones, which float32 rounds to 0 for small d
    return 2 * squared / ((squared + c.square()).sqrt() + c)


@dataclass(frozen=True)
class HuberTurn:
    """The distance c at which huber and smooth_l1 turn from square to linear."""

    c: float = HUBER_C
    schedule: HuberSchedule = "constant"

    def at(self, snr: Tensor) -> Tensor:
        """c of each image, shape of `snr`.

        Scheduled, (1-c)/(1+sigma)^2 + c with sigma = 1/sqrt(snr): 1 for clean latents, `c` for pure noise
        (Khrapov et al. 2024, "Improving diffusion models's data-corruption resistance", schedule "snr").
        """
        if self.schedule == "constant":
            return torch.full_like(snr, self.c)
        return (1 - self.c) / (1 + snr.rsqrt()).square() + self.c


def _turned(c: float | Tensor, like: Tensor) -> Tensor:
    """c as a tensor that broadcasts over the elements of each image."""
    return torch.as_tensor(c, dtype=like.dtype, device=like.device).reshape(-1, *[1] * (like.ndim - 1))


def fft_l1(answer: Tensor, target: Tensor) -> Tensor:
    """|F(answer) - F(target)| of each frequency, F the orthonormal 2-D Fourier transform.

    The meaning of "fft" here. Squared, its mean would be mse (Parseval); the absolute value counts few large
    coefficients less (as the frequency term of Cho et al. 2021, "Rethinking coarse-to-fine approach").
    """
    return _spectrum(answer - target).abs()


def fft_amp(answer: Tensor, target: Tensor) -> Tensor:
    """||F(answer)| - |F(target)|| of each frequency: what is where in the picture does not count."""
    return (_spectrum(answer).abs() - _spectrum(target).abs()).abs()


def fft_high(answer: Tensor, target: Tensor) -> Tensor:
    """fft_l1 with weights that grow with the radial frequency and have mean 1."""
    return radial_weights(*answer.shape[-2:], device=answer.device) * fft_l1(answer, target)


def radial_weights(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Weights (height, width) proportional to 1 + HIGH_GAIN * f / 0.5, f the radial frequency in 1/latent."""
    down, across = torch.fft.fftfreq(height, device=device), torch.fft.fftfreq(width, device=device)
    weights = 1 + HIGH_GAIN * torch.hypot(down[:, None], across[None, :]) / 0.5
    return weights / weights.mean()


def multiscale(answer: Tensor, target: Tensor) -> Tensor:
    """mse of both as they are and averaged over 2x2 and 4x4 latents, shape (batch, 3).

    Averages at the edges are over the latents that there are.
    """
    difference = answer - target
    pooled = (functional.avg_pool2d(difference, edge, ceil_mode=True) for edge in POOLINGS)
    return torch.stack([per_image(it.square()) for it in pooled], dim=1)


def _spectrum(latents: Tensor) -> Tensor:
    return torch.fft.fft2(latents, norm="ortho")


LOSSES: dict[str, Loss] = {
    "mse": Loss(mse),
    "l1": Loss(l1),
    "huber": Loss(huber, has_turn=True),
    "smooth_l1": Loss(smooth_l1, has_turn=True),
    "fft": Loss(fft_l1, mixes_elements=True),
    "fft_l1": Loss(fft_l1, mixes_elements=True),
    "fft_amp": Loss(fft_amp, mixes_elements=True),
    "fft_high": Loss(fft_high, mixes_elements=True),
    "multiscale": Loss(multiscale, mixes_elements=True),
}
# Losses that turn from square to linear at a distance c, which a schedule may change.
SCHEDULED_LOSSES = tuple(name for name, loss in LOSSES.items() if loss.has_turn)


def per_image(costs: Tensor) -> Tensor:
    """Mean cost of each image, shape (batch,)."""
    return costs.flatten(1).mean(1)
