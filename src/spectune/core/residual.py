"""Subtract the principal from a weight, which gives the residual, and add it back.

Both functions work tile by tile, so that a tile stays in the CPU cache from the product to the comparison.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.core.agreement import Agreement, Tally, bit_pattern
from spectune.core.linalg import empty, packed, scratch_copy, square_sum
from spectune.core.low_rank import LowRank, Product, Tile, to_matrix
from spectune.core.rounding import check_finite, round_into
from spectune.core.spectrum import DAMAGED

# Negative values that round to -0, because they are below half of the smallest value of the dtype. They lie
# in the middle of this range, because adding a principal of ordinary size loses digits.
_UNDERFLOW = {
    torch.float16: -1.5 * 2.0**-26,
    torch.float8_e4m3fn: -1.5 * 2.0**-11,
    torch.float8_e5m2: -1.5 * 2.0**-18,
}
# With a larger share of exceptions, the list would become too large.
MAX_EXCEPTIONS = 1e-3


@dataclass(frozen=True)
class Exceptions:
    """The few values that residual + principal does not restore, by position in the weight."""

    index: Tensor  # int64 (count), in row-major order
    values: Tensor  # (count), in the dtype of the weight

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Subtracted:
    """A residual, and how well residual + principal restores the weight."""

    residual: Tensor
    agreement: Agreement  # after applying the exceptions; only counts equal bits
    exceptions: Exceptions | None


def working_dtype(residual: torch.dtype) -> torch.dtype:
    """Return the dtype in which to add a residual of this dtype and a principal."""
    return torch.float64 if residual == torch.float64 else torch.float32


def restores_every_bit(residual: torch.dtype, weight: torch.dtype) -> bool:
    """Return whether a residual of dtype `residual` can restore weights of dtype `weight` bit for bit."""
    return residual.itemsize > weight.itemsize


def subtract_principal(
    weight: Tensor, low_rank: LowRank, dtype: torch.dtype, *, name: str = "weight"
) -> Subtracted:
    """Return R = W - scale*B0 A0 from the stored factors, computed in float32 and rounded once to `dtype`.

    A residual in a wider dtype than the weight restores every bit (a float32 weight needs float64). Values
    that are too small relative to their principal part become exceptions, if these are at most a thousandth
    of all values. In the dtype of the weight, the residual is rounded once, so the sum is not exact. Raises
    InputError if `dtype` cannot hold a value of the residual.
    """
    wider = restores_every_bit(dtype, weight.dtype)
    matrix = to_matrix(weight)  # (out, in*kh*kw)
    residual = empty(tuple(weight.shape), dtype)
    left = to_matrix(residual)
    tally, missed = Tally(errors=False), _ExceptionCollector(matrix.shape[1])
    working = working_dtype(dtype)
    for tile, principal in Product(low_rank, exact=wider).tiles():
        original = packed("original", matrix[tile])
        exact = scratch_copy("weight", original, working)
        if wider and weight.dtype in _UNDERFLOW:
            # a sum turns -0 into +0; the value in the table rounds back to -0
            negative_zero = (exact == 0) & exact.signbit()
            exact.masked_fill_(negative_zero, _UNDERFLOW[weight.dtype])
        round_into(left[tile], exact.sub_(principal), f"the residual of {name}")
        stored = packed("residual", left[tile])
        again = scratch_copy("again", exact.copy_(stored).add_(principal), weight.dtype)
        unequal = tally.add(again, original)
        if wider and unequal is not None:
            missed.add(tile, unequal, original)
    exceptions = missed.exceptions() if missed.count <= MAX_EXCEPTIONS * weight.numel() else None
    agreement = tally.exact() if exceptions is not None else tally.agreement()
    return Subtracted(residual, agreement, exceptions)


def add_principal(
    residual: Tensor,
    low_rank: LowRank,
    dtype: torch.dtype,
    *,
    exceptions: Exceptions | None = None,
    name: str,
    hint: str = DAMAGED,
) -> Tensor:
    """Return residual + principal as a weight of `dtype`; the inverse of `subtract_principal`.

    Raises InputError with `hint` for NaN and infinity.
    """
    weight = empty(tuple(residual.shape), dtype)
    matrix, left = to_matrix(weight), to_matrix(residual)
    exact = restores_every_bit(residual.dtype, dtype)
    for tile, principal in Product(low_rank, exact=exact).tiles():
        wide = scratch_copy("residual", left[tile], working_dtype(residual.dtype))
        wide.add_(principal)
        if not math.isfinite(square_sum(wide)):  # true also if only the squares overflow
            check_finite(wide, name, hint=hint)
        round_into(matrix[tile], wide, name)
    if exceptions is not None:
        weight.view(-1)[exceptions.index] = exceptions.values
    return weight


class _ExceptionCollector:
    """A list of exceptions, collected tile by tile."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.count = 0
        self._index: list[Tensor] = []
        self._values: list[Tensor] = []

    def add(self, tile: Tile, unequal: Tensor, original: Tensor) -> None:
        rows, columns = unequal.nonzero(as_tuple=True)
        self.count += len(rows)
        self._index.append((rows + tile[0].start) * self.columns + columns + tile[1].start)
        self._values.append(bit_pattern(original)[rows, columns].view(original.dtype))

    def exceptions(self) -> Exceptions | None:
        if not self.count:
            return None
        index, order = torch.cat(self._index).sort()
        return Exceptions(index, torch.cat(self._values)[order])
