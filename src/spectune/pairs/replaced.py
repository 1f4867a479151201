"""Tensors of a base that a tuned adapter replaces completely, because a low-rank change is not enough."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from spectune.adapters.adapter import Adapter, AnyAdapter, TunedAdapter
from spectune.core.rounding import check_dtype, check_finite, dtype_name
from spectune.errors import InputError, counted, some_of
from spectune.files.source import TensorInfo, WeightSource
from spectune.pairs.strength import Strength
from spectune.sdxl.layout import part_of


@dataclass(frozen=True)
class Replacement:
    """The replacement of a tensor of the base: W + strength * (replaced - W)."""

    info: TensorInfo  # of the tensor of the adapter, which has the shape of W
    read: Callable[[], Tensor]
    strength: float
    adapter: str  # label of the adapter

    def over(self, stored: Tensor) -> Tensor:
        """Return a new tensor: the replacement bit for bit at strength 1, else a mixture in float32.

        Raises InputError if the replacement is not finite.
        """
        tensor = self.read()
        check_finite(
            tensor,
            f"the replacement of {self.info.name} in {self.adapter}",
            hint="the training or the fit that computed it failed: use an earlier file, or train again",
        )
        if self.strength == 1:
            return tensor.clone()
        base = stored.to(torch.float32)
        return base + self.strength * (tensor.to(torch.float32) - base)


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
        for name, info in adapter.replaced_infos.items():
            read = partial(adapter.replaced.__getitem__, name)
            own = replace(info, name=name)
            replacement = Replacement(own, read, _strength(name, adapter, strength), adapter.label)
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


def rounding_notes(
    replaced: Iterable[Replacement], tensors: Mapping[str, TensorInfo], base: str
) -> tuple[str, ...]:
    """Return a warning for the replacements that have fewer bits in the model than in their adapter."""
    counts: Counter[tuple[str, torch.dtype, torch.dtype]] = Counter()
    for one in replaced:
        stored, written = one.info.dtype, tensors[one.info.name].dtype
        if _loses_bits(stored, written):
            counts[one.adapter, stored, written] += 1
    return tuple(
        f"{counted(count, 'complete tensor')} of {adapter} rounded from {dtype_name(stored)} to "
        f"{dtype_name(written)}, the dtype of {base}; `dtype` {dtype_name(stored)} keeps every bit"
        for (adapter, stored, written), count in counts.items()
    )


def _loses_bits(stored: torch.dtype, written: torch.dtype) -> bool:
    one, other = torch.finfo(stored), torch.finfo(written)
    return other.eps > one.eps or other.tiny > one.tiny


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
    expected, got = base.tensors[name].shape, replacement.info.shape
    if got != expected:
        raise InputError(
            f"{name} of {base.label} cannot be replaced by that of {replacement.adapter}: "
            f"expected shape {expected}, got {got}",
            hint="the adapter was made for a model of another size: pass that model",
        )
    check_dtype(base.tensors[name].dtype, f"{name} of {base.label}", residual=True)
