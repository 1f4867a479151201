"""A weight less its principal part, and the two put together again.

Tile by tile: a checkpoint passes through here number by number, and each tile stays in the processor's cache
from the product to the last comparison.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.core.linalg import converted, square_sum
from spectune.core.low_rank import LowRank, Product, Tile, to_matrix
from spectune.core.report import Agreement, Tally, bit_pattern
from spectune.core.rounding import check_finite, round_into
from spectune.core.spectrum import DAMAGED

# Between 0 and half of the smallest number of a type, so that it rounds to -0; as far from either end as
# a wider type can tell beside a principal of ordinary size.
_UNDERFLOW = {
    torch.float16: -1.5 * 2.0**-26,
    torch.float8_e4m3fn: -1.5 * 2.0**-11,
    torch.float8_e5m2: -1.5 * 2.0**-18,
}
# More exceptions than this share would make a file of their own.
MAX_EXCEPTIONS = 1e-3


@dataclass(frozen=True)
class Exceptions:
    """The few numbers that residual + principal cannot give back, by their place in the weight."""

    index: Tensor  # int64 (count), row by row
    values: Tensor  # (count), in the type of the weight

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Remainder:
    """What is left of a weight, how well the pair makes it again, and where it does not."""

    residual: Tensor
    agreement: Agreement  # with the exceptions applied; only bits are counted
    exceptions: Exceptions | None


def working_dtype(residual: torch.dtype) -> torch.dtype:
    """The type in which a residual of this type and a principal are added."""
    return torch.float64 if residual == torch.float64 else torch.float32


def gives_every_bit_back(residual: torch.dtype, weight: torch.dtype) -> bool:
    """Whether a residual of this type is wide enough to give weights of that type back bit for bit."""
    return residual.itemsize > weight.itemsize


def subtract_principal(
    weight: Tensor, low_rank: LowRank, dtype: torch.dtype, *, name: str = "weight"
) -> Remainder:
    """R = W - scale*B0 A0 from the factors as stored, in float32, rounded once to `dtype`.

    A residual in a wider type than the weight's gives every bit back: where a weight is too small beside its
    principal part for that, it is kept among the exceptions, unless they are more than a thousandth. A
    residual in the weight's own type costs one rounding. float64 gives a float32 weight back.
    Raises InputError when `dtype` cannot hold a residual.
    """
    wider = gives_every_bit_back(dtype, weight.dtype)
    matrix = to_matrix(weight)  # (out, in*kh*kw)
    residual = torch.empty(weight.shape, dtype=dtype)
    left = to_matrix(residual)
    tally, missed = Tally(sizes=False), _Missed(matrix.shape[1])
    working = working_dtype(dtype)
    for tile, principal in Product(low_rank, exact=wider).tiles():
        original = matrix[tile]
        exact = converted("weight", original, working)
        if wider and weight.dtype in _UNDERFLOW:
            # A zero has a sign, a sum that is zero has none: what stands in rounds back to -0.
            negative_zero = (exact == 0) & exact.signbit()
            exact.masked_fill_(negative_zero, _UNDERFLOW[weight.dtype])
        stored = left[tile]
        round_into(stored, exact.sub_(principal), f"the residual of {name}")
        again = converted("again", exact.copy_(stored).add_(principal), weight.dtype)
        unequal = tally.add(again, original)
        if wider and unequal is not None:
            missed.add(tile, unequal, original)
    exceptions = missed.exceptions() if missed.count <= MAX_EXCEPTIONS * weight.numel() else None
    agreement = tally.exact() if exceptions is not None else tally.agreement()
    return Remainder(residual, agreement, exceptions)


def add_principal(
    residual: Tensor,
    low_rank: LowRank,
    dtype: torch.dtype,
    *,
    exceptions: Exceptions | None = None,
    name: str,
    hint: str = DAMAGED,
) -> Tensor:
    """The inverse: the weight in its own `dtype`; raises InputError with `hint` for NaN and infinity."""
    weight = torch.empty(residual.shape, dtype=dtype)
    matrix, left = to_matrix(weight), to_matrix(residual)
    exact = gives_every_bit_back(residual.dtype, dtype)
    for tile, principal in Product(low_rank, exact=exact).tiles():
        wide = converted("residual", left[tile], working_dtype(residual.dtype))
        wide.add_(principal)
        if not math.isfinite(square_sum(wide)):  # also where only the squares overflow
            check_finite(wide, name, hint=hint)
        round_into(matrix[tile], wide, name)
    if exceptions is not None:
        weight.view(-1)[exceptions.index] = exceptions.values
    return weight


class _Missed:
    """Collects exceptions tile by tile."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.count = 0
        self._index: list[Tensor] = []
        self._values: list[Tensor] = []

    def add(self, tile: Tile, unequal: Tensor, original: Tensor) -> None:
        rows, columns = unequal.nonzero(as_tuple=True)
        self.count += len(rows)
        self._index.append((rows + tile[0].start) * self.columns + columns + tile[1].start)
        self._values.append(bit_pattern(original)[unequal].view(original.dtype))

    def exceptions(self) -> Exceptions | None:
        if not self.count:
            return None
        index, order = torch.cat(self._index).sort()
        return Exceptions(index, torch.cat(self._values)[order])
