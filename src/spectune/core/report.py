"""What was measured while factoring, comparing and rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.core.linalg import converted, norm, pieces, scratch, square_sum
from spectune.core.rank import full_rank

# Integers of the same width order floats of one sign; see `_ordered`.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class LayerReport:
    """One factored layer; energy is the share of its squared norm that the stored directions hold, 0..1."""

    name: str
    shape: tuple[int, ...]
    rank: int
    energy: float
    norm: float  # Frobenius norm of the weight
    largest: float  # largest singular value
    smallest_kept: float  # singular value number `rank`
    method: str = "exact"  # how the singular values were found
    excess: float = 0.0  # estimated (norm of what is left / smallest possible) - 1

    @property
    def capped(self) -> bool:
        """The rank is as large as the layer allows."""
        return self.rank == full_rank(self.shape)


@dataclass(frozen=True)
class Agreement:
    """How well a tensor agrees with the one it should be: counts of numbers, ulps of its own dtype."""

    numel: int
    bit_equal: int
    max_ulp: int
    relative_error: float  # Frobenius norm of the difference / norm of the tensor that it should be

    @property
    def share(self) -> float:
        """The bit-equal share, 0..1; exactly 1.0 only when every bit agrees."""
        return self.bit_equal / self.numel if self.numel else 1.0

    @property
    def exact(self) -> bool:
        return self.bit_equal == self.numel


class Tally:
    """Adds up how well the pieces of a tensor agree with what they should be.

    Without `sizes` only equal bits are counted, at half the cost: the errors stay 0.
    """

    def __init__(self, *, sizes: bool = True) -> None:
        self._sizes = sizes
        self._numel = 0
        self._bit_equal = 0
        self._max_ulp = 0
        self._other = False  # numbers of types that have no ulp differ
        self._error = 0.0  # sum of squares
        self._size = 0.0

    def add(self, actual: Tensor, expected: Tensor) -> Tensor | None:
        """Count a piece; where its bits differ, or None where all agree. Both have one dtype and shape."""
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        self._numel += actual.numel()
        actual_bits, expected_bits = bit_pattern(actual), bit_pattern(expected)
        unequal = torch.ne(actual_bits, expected_bits, out=_flags(actual_bits))
        count = int(torch.count_nonzero(unequal))
        self._bit_equal += actual.numel() - count
        if not self._sizes:
            return unequal if count else None
        if expected.is_floating_point():
            wide = converted("expected", expected, torch.float32)
            self._size += square_sum(wide)
            if count:
                self._max_ulp = max(self._max_ulp, _largest_distance(actual_bits, expected_bits, unequal))
                self._error += square_sum(converted("actual", actual, torch.float32).sub_(wide))
        else:
            self._other |= count > 0
        return unequal if count else None

    def agreement(self) -> Agreement:
        error = float(self._other)
        if self._error:
            error = math.sqrt(self._error / self._size) if self._size else math.inf
        return Agreement(self._numel, self._bit_equal, self._max_ulp, error)

    def exact(self) -> Agreement:
        """As if every bit had agreed."""
        return Agreement(self._numel, self._numel, 0, 0.0)


def compare(actual: Tensor, expected: Tensor) -> Agreement:
    """Count equal bit patterns and the largest distance in ulps; both tensors have one dtype and shape.

    Zeros of different sign are 0 ulp apart but not bit-equal.
    """
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    tally = Tally()
    for piece, wanted in zip(pieces(actual), pieces(expected), strict=True):
        tally.add(piece, wanted)
    return tally.agreement()


def total(agreements: Iterable[Agreement]) -> Agreement:
    """The agreement of the parts of a tensor together; its relative error is that of the worst part."""
    parts = list(agreements)
    return Agreement(
        numel=sum(part.numel for part in parts),
        bit_equal=sum(part.bit_equal for part in parts),
        max_ulp=max((part.max_ulp for part in parts), default=0),
        relative_error=max((part.relative_error for part in parts), default=0.0),
    )


def bit_pattern(tensor: Tensor) -> Tensor:
    """The bits of a float tensor as integers of the same width; other tensors as they are."""
    return tensor.view(_BITS[tensor.dtype.itemsize]) if tensor.is_floating_point() else tensor


def _flags(bits: Tensor) -> Tensor:
    return scratch("unequal", tuple(bits.shape), torch.bool)


def _largest_distance(actual: Tensor, expected: Tensor, unequal: Tensor) -> int:
    """The largest distance in ulps between two tensors of bit patterns that differ where `unequal` says."""
    if actual.element_size() > 2:
        return int((_ordered(actual[unequal]) - _ordered(expected[unequal])).abs().max())
    # the whole tile in 32 bits is faster than picking numbers out of it
    first = _ordered(converted("first", actual, torch.int32), actual.element_size())
    second = _ordered(converted("second", expected, torch.int32), actual.element_size())
    low, high = torch.aminmax(first.sub_(second))
    return max(-int(low), int(high))


def _ordered(bits: Tensor, width: int = 0) -> Tensor:
    """Sign-magnitude patterns as integers in the order of the numbers they stand for; both zeros are 0.

    Patterns of `width` bytes in wider integers are changed in place, others become int64.
    """
    wide = bits if width else bits.long()
    lowest = -(1 << (8 * width - 1)) if width else torch.iinfo(bits.dtype).min
    sign = torch.bitwise_right_shift(wide, 8 * wide.element_size() - 1)  # -1 for negative numbers, else 0
    # lowest - wide for negative patterns: (wide ^ -1) + 1 + lowest
    return wide.bitwise_xor_(sign).sub_(sign).add_(sign, alpha=-lowest)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in Frobenius norm; 0 when both are zero, infinite when only one is."""
    difference, size = norm(actual.float() - expected.float()), norm(expected.float())
    if difference == 0.0:
        return 0.0
    return difference / size if size else float("inf")


def total_energy(layers: Iterable[LayerReport]) -> float:
    """The share of the squared norm of all layers together that the stored directions hold."""
    layers = list(layers)
    total = sum(layer.norm**2 for layer in layers)
    return sum(layer.energy * layer.norm**2 for layer in layers) / total if total else 1.0


def total_share(agreements: Iterable[Agreement]) -> float:
    """The bit-equal share over several tensors, 0..1."""
    agreements = list(agreements)
    numel = sum(agreement.numel for agreement in agreements)
    return sum(agreement.bit_equal for agreement in agreements) / numel if numel else 1.0
