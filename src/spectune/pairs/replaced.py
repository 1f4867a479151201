"""Tensors of a base that a tuned adapter replaces completely, because a low-rank change is not enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.adapters.adapter import Adapter, AnyAdapter, TunedAdapter
from spectune.core.rounding import check_dtype, check_finite
from spectune.errors import InputError, counted, some_of
from spectune.files.source import WeightSource
from spectune.pairs.strength import Strength
from spectune.sdxl.layout import part_of


@dataclass(frozen=True)
class Replacement:
    """The replacement of a tensor of the base: W + strength * (replaced - W)."""

    tensor: Tensor  # float32, in the shape of W
    strength: float
    adapter: str  # label of the adapter

    def over(self, stored: Tensor) -> Tensor:
        """Return a new float32 tensor; at strength 1 it equals the replacement bit for bit."""
        if self.strength == 1:
            return self.tensor.clone()
        base = stored.to(torch.float32)
        return base + self.strength * (self.tensor - base)


def replacements(
    base: WeightSource, adapters: Sequence[tuple[AnyAdapter, Strength]]
) -> dict[str, Replacement]:
    """Return the replacements of all adapters by tensor name; strength 0 keeps the tensor of the base.

    Raises InputError if the base lacks a tensor, a shape or dtype does not fit, or two adapters replace the
    same tensor.
    """
    by_name: dict[str, Replacement] = {}
    for adapter, strength in adapters:
        if not isinstance(adapter, TunedAdapter):
            continue
        _check_known(base, adapter)
        for name, tensor in adapter.replaced.items():
            replacement = Replacement(tensor, _strength(name, adapter, strength), adapter.label)
            if replacement.strength == 0:
                continue
            _check_fits(base, name, replacement)
            if name in by_name:
                raise InputError(
                    f"{by_name[name].adapter} and {adapter.label} both replace {name}: expected one adapter",
                    hint="leave one of them out, or set its strength for this part to 0",
                )
            by_name[name] = replacement
    return by_name


def check_none_replaced(residual: WeightSource, adapter: Adapter | TunedAdapter) -> None:
    """Raise InputError if an adapter for a residual replaces tensors of its base."""
    if isinstance(adapter, TunedAdapter) and adapter.replaced:
        raise InputError(
            f"{residual.label} is a residual, and {adapter.label} replaces "
            f"{counted(len(adapter.replaced), 'tensor')} of a complete model (first "
            f"{next(iter(adapter.replaced))}): expected the original model",
            hint="pass the original model as `base`",
        )


def _check_known(base: WeightSource, adapter: TunedAdapter) -> None:
    unknown = [name for name in adapter.replaced if name not in base.tensors]
    if unknown:
        raise InputError(
            f"{len(unknown)} of {len(adapter.replaced)} tensors that {adapter.label} replaces are not in "
            f"{base.label}: {some_of(unknown)}",
            hint="the adapter was made for another model: pass that model",
        )


def _strength(name: str, adapter: TunedAdapter, strength: Strength) -> float:
    """Return the strength for the part that contains a tensor."""
    part = part_of(name)
    if part not in strength.by_part:
        raise InputError(
            f"{adapter.label} replaces {name}, which belongs to part {part}: "
            f"expected tensors of {', '.join(strength.by_part)}",
            hint="an adapter cannot replace tensors of other parts: replace them in the checkpoint",
        )
    return strength.by_part[part]


def _check_fits(base: WeightSource, name: str, replacement: Replacement) -> None:
    expected, got = base.tensors[name].shape, tuple(replacement.tensor.shape)
    if got != expected:
        raise InputError(
            f"{name} of {base.label} cannot be replaced by that of {replacement.adapter}: "
            f"expected shape {expected}, got {got}",
            hint="the adapter was made for a model of another size: pass that model",
        )
    check_dtype(base.tensors[name].dtype, f"{name} of {base.label}", residual=True)
    check_finite(
        replacement.tensor,
        f"the replacement of {name} in {replacement.adapter}",
        hint="the fit that computed it failed: train the adapter again",
    )
