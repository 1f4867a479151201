"""Latents of FLUX.2: 2 x 2 of z are one latent with four times the channels, normalized by channel.

The channels are ordered (channel of z, row, column), as in FLUX.2 and diffusers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spectune.sdxl.layout import LatentStatistics


def pack(mean: Tensor, deviation: Tensor, statistics: LatentStatistics) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of latents (batch, 4 * channels, h, w).

    The arguments are those of z, (batch, channels, 2h, 2w). The inverse of `unpack`.
    """
    means, deviations = _columns(statistics, mean)
    return (F.pixel_unshuffle(mean, 2) - means) / deviations, F.pixel_unshuffle(deviation, 2) / deviations


def unpack(latents: Tensor, statistics: LatentStatistics) -> Tensor:
    """Return z (batch, channels, 2h, 2w) from latents (batch, 4 * channels, h, w)."""
    means, deviations = _columns(statistics, latents)
    return F.pixel_shuffle(latents * deviations + means, 2)


def _columns(statistics: LatentStatistics, like: Tensor) -> tuple[Tensor, Tensor]:
    means, deviations = (
        torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
        for values in (statistics.means, statistics.deviations)
    )
    return means, deviations
