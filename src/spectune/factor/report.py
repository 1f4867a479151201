"""What was measured while factoring, comparing and rounding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.factor.linalg import norm

# Integers of the same width order floats of one sign; see `_ordered`.
_BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class LayerReport:
    """One factored layer; energy is the share of its squared norm that the stored directions hold, 0..1."""

    name: str
    shape: tuple[int, ...]
    rank: int
    wanted_rank: int
    energy: float
    norm: float  # Frobenius norm of the weight
    largest: float  # largest singular value
    smallest_kept: float  # singular value number `rank`

    @property
    def capped(self) -> bool:
        """The layer is smaller than the rank asked for."""
        return self.rank < self.wanted_rank


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


def compare(actual: Tensor, expected: Tensor) -> Agreement:
    """Count equal bit patterns and the largest distance in ulps; both tensors have one dtype and shape.

    Zeros of different sign are 0 ulp apart but not bit-equal.
    """
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    if actual.dtype not in _BITS:
        equal = int((actual == expected).sum())
        wrong = actual.numel() - equal
        return Agreement(numel=actual.numel(), bit_equal=equal, max_ulp=0, relative_error=float(wrong > 0))
    bits = _BITS[actual.dtype]
    actual_bits, expected_bits = actual.contiguous().view(bits), expected.contiguous().view(bits)
    equal = int((actual_bits == expected_bits).sum())
    if equal == actual.numel():
        return Agreement(numel=equal, bit_equal=equal, max_ulp=0, relative_error=0.0)
    distance = (_ordered(actual_bits) - _ordered(expected_bits)).abs()
    return Agreement(
        numel=actual.numel(),
        bit_equal=equal,
        max_ulp=int(distance.max()),
        relative_error=relative_error(actual, expected),
    )


def _ordered(bits: Tensor) -> Tensor:
    """Sign-magnitude patterns as integers (int64) in the order of the numbers they stand for."""
    lowest = torch.iinfo(bits.dtype).min
    wide = bits.long()
    return torch.where(wide < 0, lowest - wide, wide)


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
