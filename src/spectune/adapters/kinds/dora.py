"""DoRA: any additive change, after which rows or columns get trained norms (Liu et al. 2024, 2402.09353)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectune.adapters.kinds.change import Shape, WeightChange

LYCORIS_MAGNITUDE = "dora_scale"
PEFT_MAGNITUDE = "lora_magnitude_vector"
_EPSILON = {LYCORIS_MAGNITUDE: torch.finfo(torch.float32).eps, PEFT_MAGNITUDE: 0.0}  # added to the norms
_linalg: Any = torch.linalg


@dataclass(frozen=True)
class DoRA:
    """W + s * (m V / |V| - W), V = W + D, with a norm per row (output) or per column (input channel)."""

    direction: WeightChange  # D, at strength 1
    magnitude: Tensor  # m: (out, 1, ...) or (1, in, 1, ...)
    per_output: bool
    epsilon: float

    def change(self, weight: Tensor, strength: float) -> Tensor:
        result = self.direction.change(weight, 1.0).add_(weight)
        axes = [axis for axis in range(weight.ndim) if axis != (0 if self.per_output else 1)]
        norms = _linalg.vector_norm(result, dim=axes, keepdim=True, dtype=torch.float64) + self.epsilon
        result.mul_((self.magnitude.double() / norms).float())
        return result.sub_(weight).mul_(strength)


def magnitude_fits(suffix: str, shape: Shape, weight: Shape) -> bool:
    """Return whether a magnitude has one number per output or input channel of a weight of this shape."""
    if suffix == LYCORIS_MAGNITUDE:
        return _padded(shape, weight) in channel_shapes(weight)
    # PEFT: (out,) for linear layers, (1, out, 1, 1) for convolutions
    return math.prod(shape) == weight[0] and max(shape, default=0) == weight[0]


def channel_shapes(weight: Shape) -> tuple[Shape, Shape]:
    """Return the shapes (out, 1, ...) and (1, in, 1, ...)."""
    ones = (1,) * (len(weight) - 2)
    return (weight[0], 1, *ones), (1, weight[1], *ones)


def _padded(shape: Shape, weight: Shape) -> Shape:
    return (*shape, *(1,) * (len(weight) - len(shape))) if len(shape) == 2 else shape


def decomposed(direction: WeightChange, suffix: str, magnitude: Tensor, weight: Shape) -> DoRA:
    """Return DoRA over another change; `suffix` is that of the key of the magnitude."""
    per_output, per_input = channel_shapes(weight)
    on_output = suffix == PEFT_MAGNITUDE or _padded(tuple(magnitude.shape), weight) == per_output
    shaped = magnitude.reshape(per_output if on_output else per_input)
    return DoRA(direction, shaped, on_output, _EPSILON[suffix])
