"""Tensors of a base that a tuned adapter replaces whole because a low-rank change is not enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.adapters.adapter import Adapter, TunedAdapter
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
    adapter: str  # the label of the adapter that replaces it

    def over(self, stored: Tensor) -> Tensor:
        """Return a new float32 tensor; at strength 1 it equals the replacement bit for bit."""
        if self.strength == 1:
            return self.tensor.clone()
        base = stored.to(torch.float32)
        return base + self.strength * (self.tensor - base)


def replacements(
    base: WeightSource, adapters: Sequence[tuple[Adapter | TunedAdapter, Strength]]
) -> dict[str, Replacement]:
    """Return the replacements of all adapters by tensor name; strength 0 keeps the tensor of the base.

    Raises InputError for tensors that the base lacks, that do not fit, or that two adapters replace.
    """
    found: dict[str, Replacement] = {}
    for adapter, strength in adapters:
        if not isinstance(adapter, TunedAdapter):
            continue
        _check_known(base, adapter)
        for name, tensor in adapter.replaced.items():
            replacement = Replacement(tensor, _strength(name, adapter, strength), adapter.label)
            if replacement.strength == 0:
                continue
            _check_fits(base, name, replacement)
            if name in found:
                raise InputError(
                    f"{found[name].adapter} and {adapter.label} both replace {name}: expected one adapter",
                    hint="leave one of them out or set its strength to 0 in that part",
                )
            found[name] = replacement
    return found


def check_none_replaced(residual: WeightSource, adapter: Adapter | TunedAdapter) -> None:
    """Raise InputError when an adapter for a residual replaces tensors of its base."""
    if isinstance(adapter, TunedAdapter) and adapter.replaced:
        raise InputError(
            f"{residual.label} is a residual, and {adapter.label} replaces "
            f"{counted(len(adapter.replaced), 'tensor')} of a whole model (first "
            f"{next(iter(adapter.replaced))}): expected the original model",
            hint="pass the original model as `base`",
        )


def _check_known(base: WeightSource, adapter: TunedAdapter) -> None:
    unknown = [name for name in adapter.replaced if name not in base.tensors]
    if unknown:
        raise InputError(
            f"{len(unknown)} of {len(adapter.replaced)} tensors that {adapter.label} replaces are not in "
            f"{base.label}: {some_of(unknown)}",
            hint="the adapter belongs to another model",
        )


def _strength(name: str, adapter: TunedAdapter, strength: Strength) -> float:
    """Return the strength of the part that a tensor belongs to."""
    part = part_of(name)
    if part not in strength.by_part:
        raise InputError(
            f"{adapter.label} replaces {name}, which is of part {part}: "
            f"expected tensors of {', '.join(strength.by_part)}",
            hint="other parts have no strength: replace them in the checkpoint",
        )
    return strength.by_part[part]


def _check_fits(base: WeightSource, name: str, replacement: Replacement) -> None:
    expected, got = base.tensors[name].shape, tuple(replacement.tensor.shape)
    if got != expected:
        raise InputError(
            f"{name} of {base.label} cannot be replaced by that of {replacement.adapter}: "
            f"expected shape {expected}, got {got}",
            hint="the adapter belongs to a model of another size",
        )
    check_dtype(base.tensors[name].dtype, f"{name} of {base.label}", residual=True)
    check_finite(
        replacement.tensor,
        f"{name} as {replacement.adapter} replaces it",
        hint="the fit that made it failed: make the adapter again",
    )
