"""Differences of biases, norms and embeddings, which adapters add to tensors that are not layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.adapters.adapter import AnyAdapter, GeneralAdapter, ParameterDifference
from spectune.core.linalg import largest_magnitude
from spectune.core.rounding import check_dtype
from spectune.errors import InputError, counted, some_of
from spectune.files.source import WeightSource
from spectune.pairs.strength import Strength
from spectune.sdxl.layers import squeezed


@dataclass(frozen=True)
class Addition:
    """A difference times a strength."""

    difference: ParameterDifference
    strength: float

    def add_to(self, tensor: Tensor) -> bool:
        """Add to a float32 tensor of the base in place; return whether the difference is not zero."""
        part = self.difference.view.read(tensor)
        amount = self.difference.read().reshape(part.shape) * self.strength
        if largest_magnitude(amount) == 0:
            return False
        part.copy_(add(part, amount))
        return True


def add(weight: Tensor, amount: Tensor) -> Tensor:
    """Return weight + amount in float32; keep the weight where the amount is 0, because -0 + 0 is +0."""
    return torch.where(amount == 0, weight, weight + amount)


def additions(
    base: WeightSource, adapters: Sequence[tuple[AnyAdapter, Strength]]
) -> dict[str, tuple[Addition, ...]]:
    """Return the differences of all adapters by tensor name, without those of strength 0.

    Raises InputError for all differences that do not fit the base.
    """
    by_tensor: dict[str, tuple[Addition, ...]] = {}
    for adapter, strength in adapters:
        if not isinstance(adapter, GeneralAdapter):
            continue
        wrong: list[str] = []
        for name, difference in adapter.differences.items():
            problem = _misfit(base, difference)
            if problem:
                wrong.append(f"{name} {problem}")
            elif strength.of(name):
                tensor = difference.view.tensor
                addition = Addition(difference, strength.of(name))
                by_tensor[tensor] = (*by_tensor.get(tensor, ()), addition)
        if wrong:
            raise InputError(
                f"{counted(len(wrong), 'difference')} of {adapter.label} do not fit {base.label}: "
                f"{some_of(wrong)}",
                hint="the adapter was probably made for another model: pass that model",
            )
    return by_tensor


def _misfit(base: WeightSource, difference: ParameterDifference) -> str:
    """Return what is wrong with a difference, or an empty string."""
    info = base.tensors.get(difference.view.tensor)
    if info is None:
        return f"has no tensor {difference.view.tensor}"
    check_dtype(info.dtype, f"{info.name} of {base.label}", residual=True)
    expected = tuple(difference.view.read(torch.empty(info.shape, device="meta")).shape)
    if squeezed(difference.shape) == squeezed(expected):
        return ""
    return f"has shape {expected}, the difference {difference.shape}"
