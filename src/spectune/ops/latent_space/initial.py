"""Weights of the first and last convolution for another number of latent channels, from the old ones.

`zeros` keeps the weights of the first channels; further channels have zero weights.
`copy` repeats the old channels: new channel i gets the weights of old channel i modulo the old number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def first_convolution(weight: Tensor, channels: int, *, repeat: bool) -> Tensor:
    """Return the weight (out, channels, kh, kw) of conv_in from (out, old, kh, kw).

    Copies are scaled by sqrt(old / channels): independent noise then excites the layer as before.
    """
    old = weight.shape[1]
    if repeat:
        return weight[:, torch.arange(channels) % old] * math.sqrt(old / channels)
    return _cut_or_padded(weight.transpose(0, 1), channels).transpose(0, 1).contiguous()


def last_convolution(weight: Tensor, bias: Tensor, channels: int, *, repeat: bool) -> tuple[Tensor, Tensor]:
    """Return weight (channels, in, kh, kw) and bias (channels,) of conv_out. Copies are not scaled."""
    if repeat:
        rows = torch.arange(channels) % len(weight)
        return weight[rows], bias[rows]
    return _cut_or_padded(weight, channels), _cut_or_padded(bias, channels)


def _cut_or_padded(rows: Tensor, count: int) -> Tensor:
    missing = max(count - len(rows), 0)
    return torch.cat([rows[:count], rows.new_zeros(missing, *rows.shape[1:])])
