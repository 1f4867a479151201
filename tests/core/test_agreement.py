"""Shares of equal bits, ulps and relative errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectune.core.agreement import compare, total_share
from spectune.core.linalg import relative_error
from spectune.core.split import LayerReport, total_energy

FLOATS = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", FLOATS)
def test_neighboring_values_are_one_ulp_apart(dtype: torch.dtype) -> None:
    one = torch.ones(4, dtype=dtype)
    near = one.clone()
    near[0] += torch.finfo(dtype).eps
    agreement = compare(near, one)
    assert (agreement.numel, agreement.bit_equal, agreement.max_ulp) == (4, 3, 1)
    assert agreement.share == 0.75
    assert not agreement.exact
    assert agreement.relative_error == pytest.approx(torch.finfo(dtype).eps / 2)
    assert compare(one, one.clone()).exact


@pytest.mark.parametrize("dtype", FLOATS)
def test_ulps_count_across_zero(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    plus = torch.tensor([tiny], dtype=torch.float64).to(dtype)
    assert compare(plus, -plus).max_ulp == 2
    signed = compare(torch.tensor([-0.0], dtype=dtype), torch.tensor([0.0], dtype=dtype))
    assert (signed.bit_equal, signed.max_ulp, signed.relative_error) == (0, 0, 0.0)


def ordered(patterns: Tensor) -> Tensor:
    """Return the position of 16-bit floats among all floats, from sign and magnitude."""
    magnitude = patterns.long() & 0x7FFF
    return torch.where(patterns < 0, -magnitude, magnitude)


@pytest.mark.parametrize("spread", [1, 300, 40_000])  # in ulps: one sign, across zero, more than 16 bits
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_distances_of_16_bits_are_those_of_the_ordered_patterns(dtype: torch.dtype, spread: int) -> None:
    generator = torch.Generator().manual_seed(spread)
    centre = torch.randint(-200, 200, (500,), generator=generator)
    moved = centre + torch.randint(-spread, spread + 1, (500,), generator=generator)
    first, second = (
        torch.where(position < 0, -position - (1 << 15), position).clamp(-(1 << 15), (1 << 15) - 1).short()
        for position in (centre.clamp(-30_000, 30_000), moved.clamp(-31_000, 31_000))
    )
    if spread > 30_000:
        first[0], second[0] = 31_000, -1768  # positions 31,000 and -31,000
    expected = int((ordered(first) - ordered(second)).abs().max())
    assert expected > (spread if spread < 30_000 else 1 << 15) - 2
    assert compare(first.view(dtype), second.view(dtype)).max_ulp == expected


def test_integers_are_compared_by_value() -> None:
    agreement = compare(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]))
    assert (agreement.bit_equal, agreement.numel, agreement.exact) == (2, 3, False)


@given(st.lists(st.floats(-1000, 1000, width=16), min_size=1, max_size=8), st.integers(0, 3))
@settings(deadline=None, max_examples=50)
def test_ulps_are_symmetric(values: list[float], steps: int) -> None:
    start = torch.tensor(values, dtype=torch.float32)
    moved = start
    for _ in range(steps):
        moved = torch.nextafter(moved, torch.full_like(moved, math.inf))
    assert compare(start, moved).max_ulp == compare(moved, start).max_ulp
    # the first step from -0 leads to the smallest positive value
    assert compare(start, moved).max_ulp == steps


def test_relative_errors() -> None:
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 4.0])) == pytest.approx(0.75)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf


def test_total_share_is_weighted_by_size() -> None:
    def layer(energy: float, norm: float) -> LayerReport:
        return LayerReport("x", (2, 2), 1, energy=energy, norm=norm, largest=1.0, smallest_kept=1.0)

    assert total_energy([layer(1.0, 3.0), layer(0.0, 1.0)]) == pytest.approx(0.9)
    assert total_energy([]) == 1.0
    half = compare(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]))
    whole = compare(torch.ones(6), torch.ones(6))
    assert total_share([half, whole]) == pytest.approx(7 / 8)
