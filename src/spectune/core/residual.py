"""The residual: a weight minus its principal part, and the inverse, their sum.

Both work tile by tile, so that a tile stays in the CPU cache from the product to the last comparison.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.core.agreement import Agreement, Tally, bit_pattern
from spectune.core.linalg import scratch_copy, square_sum
from spectune.core.low_rank import LowRank, Product, Tile, to_matrix
from spectune.core.rounding import check_finite, round_into
from spectune.core.spectrum import DAMAGED

# A value between 0 and half of the dtype's smallest, so that it rounds to -0: in the middle, since the wider
# dtype loses digits when a principal of ordinary size is added.
_UNDERFLOW = {
    torch.float16: -1.5 * 2.0**-26,
    torch.float8_e4m3fn: -1.5 * 2.0**-11,
    torch.float8_e5m2: -1.5 * 2.0**-18,
}
# Above this share the exceptions would be a file of their own.
MAX_EXCEPTIONS = 1e-3


@dataclass(frozen=True)
class Exceptions:
    """The few values that residual + principal cannot restore, by their place in the weight."""

    index: Tensor  # int64 (count), in row-major order
    values: Tensor  # (count), in the dtype of the weight

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Subtracted:
    """A residual, and how well residual + principal restores the weight."""

    residual: Tensor
    agreement: Agreement  # with the exceptions applied; without errors
    exceptions: Exceptions | None


def working_dtype(residual: torch.dtype) -> torch.dtype:
    """Return the dtype in which a residual of this dtype and a principal are added."""
    return torch.float64 if residual == torch.float64 else torch.float32


def restores_every_bit(residual: torch.dtype, weight: torch.dtype) -> bool:
    """Return whether a residual of this dtype can restore weights of that dtype bit for bit."""
    return residual.itemsize > weight.itemsize


def subtract_principal(
    weight: Tensor, low_rank: LowRank, dtype: torch.dtype, *, name: str = "weight"
) -> Subtracted:
    """Return R = W - scale*B0 A0 from the stored factors, in float32 and rounded once to `dtype`.

    A residual wider than the weight restores every bit (float64 for a float32 weight). Values that are too
    small relative to their principal part become exceptions, unless they are more than a thousandth. In the
    weight's own dtype a residual costs one rounding. Raises InputError if `dtype` cannot hold a residual.
    """
    wider = restores_every_bit(dtype, weight.dtype)
    matrix = to_matrix(weight)  # (out, in*kh*kw)
    residual = torch.empty(weight.shape, dtype=dtype)
    left = to_matrix(residual)
    tally, missed = Tally(errors=False), _ExceptionCollector(matrix.shape[1])
    working = working_dtype(dtype)
    for tile, principal in Product(low_rank, exact=wider).tiles():
        original = matrix[tile]
        exact = scratch_copy("weight", original, working)
        if wider and weight.dtype in _UNDERFLOW:
            # -0 is lost in a sum; this stand-in rounds back to -0
            negative_zero = (exact == 0) & exact.signbit()
            exact.masked_fill_(negative_zero, _UNDERFLOW[weight.dtype])
        stored = left[tile]
        round_into(stored, exact.sub_(principal), f"the residual of {name}")
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
    """Return the weight in its own `dtype`; raise InputError with `hint` for NaN and infinity.

    The inverse of `subtract_principal`.
    """
    weight = torch.empty(residual.shape, dtype=dtype)
    matrix, left = to_matrix(weight), to_matrix(residual)
    exact = restores_every_bit(residual.dtype, dtype)
    for tile, principal in Product(low_rank, exact=exact).tiles():
        wide = scratch_copy("residual", left[tile], working_dtype(residual.dtype))
        wide.add_(principal)
        if not math.isfinite(square_sum(wide)):  # also where only the squares overflow
            check_finite(wide, name, hint=hint)
        round_into(matrix[tile], wide, name)
    if exceptions is not None:
        weight.view(-1)[exceptions.index] = exceptions.values
    return weight


class _ExceptionCollector:
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
