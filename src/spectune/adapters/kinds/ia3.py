"""(IA)^3: a trained factor per row or column of a weight (Liu et al. 2022, arXiv 2205.05638; LyCORIS)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from spectune.adapters.kinds.change import ChangeKind, Shape, Shapes, Tensors, no_rank
from spectune.adapters.kinds.dora import channel_shapes
from spectune.errors import InputError

_FACTORS, ON_INPUT = "weight", "on_input"


@dataclass(frozen=True)
class IA3:
    """W + s * W l, l one factor per output or input channel."""

    factors: Tensor  # l: (out, 1, ...) or (1, in, 1, ...)

    def change(self, weight: Tensor, strength: float) -> Tensor:
        return weight * (self.factors.to(weight.dtype) * strength)


def _read(tensors: Tensors, alpha: float | None, weight: Shape) -> IA3:
    per_output, per_input = channel_shapes(weight)
    is_input = bool(tensors[ON_INPUT].item())
    shape, factors = per_input if is_input else per_output, tensors[_FACTORS]
    if factors.numel() != math.prod(shape):
        raise InputError(
            f"an (IA)^3 layer has {factors.numel()} factors: expected {math.prod(shape)}, one per "
            f"{'input' if is_input else 'output'} channel, because its `{ON_INPUT}` is {is_input}",
            hint="the file is damaged, or was made for another model",
        )
    return IA3(factors.reshape(shape))


def _fits(shapes: Shapes, weight: Shape) -> bool:
    # (n,) for linear layers, (1, n, 1, 1) for convolutions
    return max(shapes[_FACTORS], default=0) == math.prod(shapes[_FACTORS]) in weight[:2]


IA3_KIND = ChangeKind("(IA)^3", (frozenset({_FACTORS, ON_INPUT}),), _fits, no_rank, _read)
