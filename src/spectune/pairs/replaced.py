"""Tensors of a base that an adapter replaces whole, because no change of low rank would be enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.adapters.adapter import Adapter, TunedAdapter
from spectune.core.rounding import check_dtype, check_finite
from spectune.errors import InputError, some_of
from spectune.files.source import WeightSource
from spectune.pairs.strength import Strength
from spectune.sdxl.layout import part_of


@dataclass(frozen=True)
class Replacement:
    """What stands in for a tensor of the base: W + strength * (replaced - W)."""

    tensor: Tensor  # float32, the shape of the base's
    strength: float
    adapter: str  # the label of the adapter that replaces it

    def over(self, stored: Tensor) -> Tensor:
        """A new tensor in float32; at strength 1 it is the replacing one, number for number."""
        if self.strength == 1:
            return self.tensor.clone()
        base = stored.to(torch.float32)
        return base + self.strength * (self.tensor - base)


def replacements(
    base: WeightSource, adapters: Sequence[tuple[Adapter | TunedAdapter, Strength]]
) -> dict[str, Replacement]:
    """What the adapters replace, by tensor name; strength 0 leaves the base's.

    Raises InputError for tensors that the base lacks or that do not fit, and for one that two replace.
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
                    f"{found[name].adapter} and {adapter.label} both replace {name} whole: expected one "
                    "adapter to do so",
                    hint="take one of the two, or give the other strength 0 in that part",
                )
            found[name] = replacement
    return found


def check_none_replaced(residual: WeightSource, adapter: Adapter | TunedAdapter) -> None:
    """Raise InputError when an adapter that replaces tensors of its base is put on a residual."""
    if isinstance(adapter, TunedAdapter) and adapter.replaced:
        raise InputError(
            f"{residual.label} is a residual, and {adapter.label} replaces {len(adapter.replaced)} tensors "
            f"of a whole model (first {next(iter(adapter.replaced))}): expected the original model",
            hint="pass the original model as --base",
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
    """The strength of the part that a tensor belongs to."""
    part = part_of(name)
    if part not in strength.by_part:
        raise InputError(
            f"{adapter.label} replaces {name}, which is of part {part}: "
            f"expected tensors of {', '.join(strength.by_part)}",
            hint="other parts have no strength: exchange them in the checkpoint",
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
        hint="the fit that made it went wrong: make the adapter again",
    )
