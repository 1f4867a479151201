"""Measure how well a tensor agrees with its expected values: equal bits, ulps, relative errors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.core.linalg import pieces, scratch, scratch_copy, square_sum

# As integers of the same width, floats of one sign are ordered by value; see `_ordered`.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Agreement:
    """The agreement of a tensor with its expected values."""

    numel: int
    bit_equal: int  # number of elements
    max_ulp: int  # in ulps of the dtype of the tensor
    relative_error: float  # Frobenius norm of the difference / norm of the expected tensor

    @property
    def share(self) -> float:
        """Return the share of bit-equal elements, 0..1; exactly 1.0 only if every bit agrees."""
        return self.bit_equal / self.numel if self.numel else 1.0

    @property
    def exact(self) -> bool:
        return self.bit_equal == self.numel


class Tally:
    """A counter of the agreement of a tensor, piece by piece.

    Without `errors`, it only counts equal bits, at half the cost; ulps and errors stay 0.
    """

    def __init__(self, *, errors: bool = True) -> None:
        self._errors = errors
        self._numel = 0
        self._bit_equal = 0
        self._max_ulp = 0
        self._other = False  # whether values of an integer or boolean dtype differ
        self._error = 0.0  # sum of squares of the difference
        self._size = 0.0  # sum of squares of the expected values

    def add(self, actual: Tensor, expected: Tensor, wide: Tensor | None = None) -> Tensor | None:
        """Compare two pieces and add the result to the tally.

        Return None if all bits agree. Otherwise return a tensor that is nonzero exactly where bits differ. It
        is in scratch memory, and valid only for a tally without `errors`.

        Both tensors have the same dtype and shape. `wide` is `expected` in float32, if the caller has it.
        """
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        self._numel += actual.numel()
        actual_bits, expected_bits = bit_pattern(actual), bit_pattern(expected)
        if torch.equal(actual_bits, expected_bits):
            unequal, count = None, 0
        else:
            unequal = _differences(actual_bits, expected_bits)
            count = int(torch.count_nonzero(unequal))
        self._bit_equal += actual.numel() - count
        if not self._errors:
            return unequal
        if expected.is_floating_point():
            wide = scratch_copy("expected", expected, torch.float32) if wide is None else wide
            self._size += square_sum(wide)
            if unequal is not None:
                self._max_ulp = max(self._max_ulp, _largest_distance(actual_bits, expected_bits, unequal))
                self._error += square_sum(scratch_copy("actual", actual, torch.float32).sub_(wide))
        else:
            self._other |= count > 0
        return unequal

    def agreement(self) -> Agreement:
        error = float(self._other)
        if self._error:
            error = math.sqrt(self._error / self._size) if self._size else math.inf
        return Agreement(self._numel, self._bit_equal, self._max_ulp, error)

    def exact(self) -> Agreement:
        """Return the agreement of a tensor of this size whose bits all agree."""
        return Agreement(self._numel, self._numel, 0, 0.0)


def compare(actual: Tensor, expected: Tensor) -> Agreement:
    """Compare two tensors of the same dtype and shape.

    Zeros of different sign are 0 ulp apart but not bit-equal.
    """
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    if torch.equal(bit_pattern(actual), bit_pattern(expected)):
        return Agreement(actual.numel(), actual.numel(), 0, 0.0)
    tally = Tally()
    for piece, expected_piece in zip(pieces(actual), pieces(expected), strict=True):
        tally.add(piece, expected_piece)
    return tally.agreement()


def total_agreement(agreements: Iterable[Agreement]) -> Agreement:
    """Return the agreement of a tensor from those of its parts; takes the largest relative error."""
    parts = list(agreements)
    return Agreement(
        numel=sum(part.numel for part in parts),
        bit_equal=sum(part.bit_equal for part in parts),
        max_ulp=max((part.max_ulp for part in parts), default=0),
        relative_error=max((part.relative_error for part in parts), default=0.0),
    )


def bit_pattern(tensor: Tensor) -> Tensor:
    """Return the bits of a float tensor as integers of the same width; return other tensors unchanged."""
    return tensor.view(_BITS[tensor.dtype.itemsize]) if tensor.is_floating_point() else tensor


def _differences(actual: Tensor, expected: Tensor) -> Tensor:
    """Return a tensor that is nonzero where bits differ: their XOR for int16, otherwise a mask."""
    shape = tuple(actual.shape)
    if actual.dtype == torch.int16:  # several times as fast as a comparison
        return torch.bitwise_xor(actual, expected, out=scratch("differing", shape, torch.int16))
    return torch.ne(actual, expected, out=scratch("unequal", shape, torch.bool))


def _largest_distance(actual: Tensor, expected: Tensor, unequal: Tensor) -> int:
    """Return the largest distance in ulps between two tensors of bit patterns.

    `unequal` is the result of `_differences`; it is overwritten.
    """
    if actual.dtype == torch.int16:
        distance = _largest_distance_16(actual, expected, unequal)
        if distance is not None:
            return distance
    if actual.element_size() > 2:
        return int((_ordered(actual[unequal]) - _ordered(expected[unequal])).abs().max())
    # converting all elements to 32 bits is faster than selecting some
    first = _ordered(scratch_copy("first", actual, torch.int32), actual.element_size())
    second = _ordered(scratch_copy("second", expected, torch.int32), actual.element_size())
    low, high = torch.aminmax(first.sub_(second))
    return max(-int(low), int(high))


def _largest_distance_16(actual: Tensor, expected: Tensor, differing: Tensor) -> int | None:
    """Return the largest distance in ulps between 16-bit floats; None if it exceeds the range of int16.

    The distance of two values with the same sign is the difference of their bit patterns. The distance of two
    values with different signs is the sum of their patterns without the sign bits. `differing` is changed.
    """
    crosses = differing.bitwise_right_shift_(15)  # -1 where the signs differ
    sums = torch.add(actual, expected, out=scratch("distance", tuple(actual.shape), torch.int16))
    smallest, across = torch.aminmax(sums.bitwise_xor_(-1 << 15).bitwise_and_(crosses))
    if int(smallest) < 0:
        return None
    distance = torch.sub(actual, expected, out=sums).bitwise_and_(crosses.bitwise_not_())
    low, high = torch.aminmax(distance)
    return max(-int(low), int(high), int(across))


def _ordered(bits: Tensor, width: int = 0) -> Tensor:
    """Map bit patterns of floats to integers in the order of the float values; both zeros become 0.

    With `width`, patterns of `width` bytes in wider integers are changed in place. Otherwise the result is
    int64.
    """
    wide = bits if width else bits.long()
    lowest = -(1 << (8 * width - 1)) if width else torch.iinfo(bits.dtype).min
    sign = torch.bitwise_right_shift(wide, 8 * wide.element_size() - 1)  # -1 for negative values, else 0
    # lowest - wide for negative patterns: (wide ^ -1) + 1 + lowest
    return wide.bitwise_xor_(sign).sub_(sign).add_(sign, alpha=-lowest)


def total_share(agreements: Iterable[Agreement]) -> float:
    """Return the share of bit-equal elements over several tensors, 0..1."""
    agreements = list(agreements)
    numel = sum(agreement.numel for agreement in agreements)
    return sum(agreement.bit_equal for agreement in agreements) / numel if numel else 1.0
