"""Loss functions by name.

A loss maps (predicted, target), both (batch, channels, h, w), to costs with the same leading axis. The cost
of an image is the mean over all other axes. To add a loss, write the function and add a row to `LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

HUBER_C = 0.1  # the default of the papers and of kohya
# an error at the Nyquist frequency has 1 + HIGH_GAIN times the weight of an error of the mean
HIGH_GAIN = 4.0
POOLINGS = (1, 2, 4)  # edge lengths, in latents, of the squares that `multiscale` averages over
HuberSchedule = Literal["constant", "snr"]


@dataclass(frozen=True)
class Loss:
    """A loss function with the facts that the recipe and the documentation need.

    A mask (batch, 1, h, w) in 0..1 multiplies the cost of each element. If a loss mixes elements (a Fourier
    transform, an average), its costs have no position. It then gets masked predictions and targets instead.
    """

    cost: Callable[..., Tensor]
    help: str
    formula: str  # of one element; d = predicted - target
    source: str
    mixes_elements: bool = False
    takes_huber_c: bool = False  # a third argument: a float or (batch,)

    def __call__(
        self,
        predicted: Tensor,
        target: Tensor,
        *,
        mask: Tensor | None = None,
        huber_c: float | Tensor = HUBER_C,
    ) -> Tensor:
        """Return float32 costs with the leading axis of `predicted`."""
        # float32: squares and Fourier sums of 16-bit values lose small errors
        predicted, target = predicted.float(), target.float()
        if mask is not None and self.mixes_elements:
            predicted, target = predicted * mask, target * mask
        arguments = (predicted, target, huber_c) if self.takes_huber_c else (predicted, target)
        costs = self.cost(*arguments)
        return costs if mask is None or self.mixes_elements else costs * mask


def mse(predicted: Tensor, target: Tensor) -> Tensor:
    """Return d^2 per element."""
    return (predicted - target).square()


def l1(predicted: Tensor, target: Tensor) -> Tensor:
    """Return |d| per element."""
    return (predicted - target).abs()


def huber(predicted: Tensor, target: Tensor, c: float | Tensor) -> Tensor:
    """Return 2c (sqrt(d^2 + c^2) - c) per element: about d^2 near 0, about 2c|d| beyond c."""
    return _per_element(c, predicted) * smooth_l1(predicted, target, c)


def smooth_l1(predicted: Tensor, target: Tensor, c: float | Tensor) -> Tensor:
    """Return 2 (sqrt(d^2 + c^2) - c) per element: about d^2/c near 0, about 2|d| beyond c."""
    squared, c = (predicted - target).square(), _per_element(c, predicted)
    # the same value, but without a difference of close values, which float32 rounds to 0 for small d
    return 2 * squared / ((squared + c.square()).sqrt() + c)


@dataclass(frozen=True)
class HuberThreshold:
    """The distance c where huber and smooth_l1 change from quadratic to linear."""

    c: float = HUBER_C
    schedule: HuberSchedule = "constant"

    def at(self, snr: Tensor) -> Tensor:
        """Return c for each image, with the shape of `snr`.

        The schedule "snr" is (1-c)/(1+sigma)^2 + c with sigma = 1/sqrt(snr): 1 for clean latents, `c` for
        pure noise (Khrapov et al. 2024, "Improving diffusion models's data-corruption resistance", schedule
        "snr").
        """
        if self.schedule == "constant":
            return torch.full_like(snr, self.c)
        return (1 - self.c) / (1 + snr.rsqrt()).square() + self.c


def _per_element(c: float | Tensor, like: Tensor) -> Tensor:
    """Return c as a tensor that broadcasts over the elements of each image."""
    return torch.as_tensor(c, dtype=like.dtype, device=like.device).reshape(-1, *[1] * (like.ndim - 1))


def fft_l1(predicted: Tensor, target: Tensor) -> Tensor:
    """Return |F(d)| per frequency, where F is the orthonormal 2-D Fourier transform.

    The mean of its square would equal mse (Parseval). The absolute value gives less weight to a few large
    coefficients.
    """
    return _spectrum(predicted - target).abs()


def fft_amp(predicted: Tensor, target: Tensor) -> Tensor:
    """Return ||F(predicted)| - |F(target)|| per frequency, which ignores positions in the image."""
    return (_spectrum(predicted).abs() - _spectrum(target).abs()).abs()


def fft_high(predicted: Tensor, target: Tensor) -> Tensor:
    """Return fft_l1 times weights that grow with the radial frequency. Their mean is 1."""
    return radial_weights(*predicted.shape[-2:], device=predicted.device) * fft_l1(predicted, target)


def radial_weights(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Return weights (height, width) proportional to 1 + HIGH_GAIN * f / 0.5, with mean 1.

    f is the radial frequency in cycles per latent.
    """
    down, across = torch.fft.fftfreq(height, device=device), torch.fft.fftfreq(width, device=device)
    weights = 1 + HIGH_GAIN * torch.hypot(down[:, None], across[None, :]) / 0.5
    return weights / weights.mean()


def multiscale(predicted: Tensor, target: Tensor) -> Tensor:
    """Return mse at full resolution and after averaging over 2x2 and 4x4 latents, shape (batch, 3).

    A square that extends beyond the edge averages the latents inside the image.
    """
    difference = predicted - target
    pooled = (functional.avg_pool2d(difference, edge, ceil_mode=True) for edge in POOLINGS)
    return torch.stack([per_image(average.square()) for average in pooled], dim=1)


def _spectrum(latents: Tensor) -> Tensor:
    return torch.fft.fft2(latents, norm="ortho")


def per_image(costs: Tensor) -> Tensor:
    """Return the mean cost of each image, shape (batch,)."""
    return costs.flatten(1).mean(1)


_FFT_L1 = Loss(
    fft_l1,
    help="all frequencies have the same weight; a few large coefficients weigh less than in mse",
    formula="|F(d)|",
    source='the frequency term of Cho et al. 2021, "Rethinking coarse-to-fine approach"',
    mixes_elements=True,
)
LOSSES: dict[str, Loss] = {
    "mse": Loss(mse, help="squared error", formula="d^2", source="Ho et al. 2020, eq. 14"),
    "l1": Loss(l1, help="absolute error", formula="|d|", source="standard"),
    "huber": Loss(
        huber,
        help="squared near 0, linear beyond `huber_c`; scaled like mse",
        formula="2c (sqrt(d^2 + c^2) - c)",
        source="pseudo-Huber (Charbonnier et al. 1997), scaled as in kohya-ss/sd-scripts",
        takes_huber_c=True,
    ),
    "smooth_l1": Loss(
        smooth_l1,
        help="squared near 0, linear beyond `huber_c`; scaled like l1",
        formula="2 (sqrt(d^2 + c^2) - c)",
        source="pseudo-Huber (Charbonnier et al. 1997), scaled as in kohya-ss/sd-scripts",
        takes_huber_c=True,
    ),
    "fft": _FFT_L1,
    "fft_l1": _FFT_L1,
    "fft_amp": Loss(
        fft_amp,
        help="compares the amplitudes of frequencies and ignores positions in the image",
        formula="||F(predicted)| - |F(target)||",
        source="this project",
        mixes_elements=True,
    ),
    "fft_high": Loss(
        fft_high,
        help="fft_l1 with more weight on high frequencies",
        formula=f"w |F(d)|, w ~ 1 + {HIGH_GAIN:g} f / 0.5 with mean 1, f the radial frequency",
        source="this project",
        mixes_elements=True,
    ),
    "multiscale": Loss(
        multiscale,
        help="mean of mse at full resolution and mse of 2x2 and 4x4 averages",
        formula="mean over p = 1, 2, 4 of mean(pool_p(d)^2)",
        source="this project",
        mixes_elements=True,
    ),
}
HUBER_LOSSES = tuple(name for name, loss in LOSSES.items() if loss.takes_huber_c)
