"""The sum of layers of several adapters."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectune.core.combine import Term, concatenated, sum_terms
from spectune.core.delta import Delta, change
from spectune.core.low_rank import LowRank, to_factors
from spectune.errors import InputError

SHAPES = ((12, 9), (9, 14), (8, 6, 3, 3), (10, 7, 1, 1))
shapes = st.sampled_from(SHAPES)
ranks = st.lists(st.integers(1, 4), min_size=1, max_size=3)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def drawn(
    shape: tuple[int, ...], rank: int, seed: int, *, alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> LowRank:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, generator=generator)
    down = torch.randn(rank, math.prod(shape[1:]), generator=generator)
    up, down = to_factors(up, down, shape)
    return LowRank(down.to(dtype), up.to(dtype), float(rank if alpha is None else alpha))


def exact(pair: LowRank) -> Tensor:
    return pair.alpha / pair.rank * (pair.up.flatten(1).double() @ pair.down.flatten(1).double())


def error(actual: LowRank, expected: Tensor, size: float) -> float:
    return float((exact(actual) - expected).norm()) / size


@given(
    shape=shapes,
    ranks=ranks,
    weights=st.lists(st.floats(-2, 2).filter(lambda w: abs(w) > 0.01), min_size=3, max_size=3),
    alphas=st.lists(st.sampled_from([None, 0.5, 3.0]), min_size=3, max_size=3),
    unit_scale=st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_the_product_of_a_sum_is_the_sum_of_products(
    shape: tuple[int, ...],
    ranks: list[int],
    weights: list[float],
    alphas: list[float | None],
    unit_scale: bool,
) -> None:
    pairs = [
        drawn(shape, rank, seed, alpha=alpha)
        for seed, (rank, alpha) in enumerate(zip(ranks, alphas, strict=False))
    ]
    terms = [Term(pair, weight) for pair, weight in zip(pairs, weights, strict=False)]
    result = sum_terms(terms, torch.float32, "layer", unit_scale=unit_scale)
    parts = [term.weight * exact(pair) for term, pair in zip(terms, pairs, strict=True)]
    size = sum(float(part.norm()) for part in parts)
    expected = sum(parts, start=torch.zeros(1, dtype=torch.float64))
    assert error(result.low_rank, expected, size) < 3e-7
    full = min(shape[0], math.prod(shape[1:]))
    assert result.low_rank.rank == (sum(ranks) if len(ranks) == 1 else min(sum(ranks), full))
    assert result.low_rank.down.shape[1:] == shape[1:]
    assert not unit_scale or result.low_rank.scale == 1
    # mutation: the weight of the largest part off by 1 %
    nudged = expected + 0.01 * max(parts, key=lambda part: float(part.norm()))
    assert error(result.low_rank, nudged, size) > 1e-3


@given(shape=shapes, rank=st.integers(1, 20), dtype=st.sampled_from(DTYPES), alpha=st.floats(0.1, 50))
@settings(deadline=None, max_examples=40)
def test_one_layer_at_weight_one_is_unchanged(
    shape: tuple[int, ...], rank: int, dtype: torch.dtype, alpha: float
) -> None:
    pair = drawn(shape, rank, 0, alpha=alpha, dtype=dtype)
    result = sum_terms([Term(pair, 1.0)], dtype, "layer")
    assert torch.equal(result.low_rank.down, pair.down)
    assert torch.equal(result.low_rank.up, pair.up)
    assert (result.low_rank.alpha, result.report.error, result.report.rank) == (alpha, 0.0, rank)


@given(
    shape=shapes, dtype=st.sampled_from(DTYPES), weight=st.floats(0.02, 2), alpha=st.sampled_from([1.0, 8.0])
)
@settings(deadline=None, max_examples=40)
def test_the_report_has_the_rounding_error(
    shape: tuple[int, ...], dtype: torch.dtype, weight: float, alpha: float
) -> None:
    pair = drawn(shape, 3, 0, alpha=alpha, dtype=dtype)
    result = sum_terms([Term(pair, weight)], dtype, "layer")
    expected = weight * exact(pair)
    size = float(expected.norm())
    assert result.report.norm == pytest.approx(size, rel=1e-6)
    assert result.report.error == pytest.approx(error(result.low_rank, expected, size), rel=1e-3, abs=1e-9)
    assert result.report.error < torch.finfo(dtype).eps * 4
    assert torch.equal(result.low_rank.down, pair.down)
    assert result.low_rank.alpha == alpha


def test_changes_that_cancel_give_zero() -> None:
    pair = drawn((12, 9), 3, 0)
    result = sum_terms([Term(pair, 1.0), Term(pair, -1.0)], torch.float32, "layer")
    assert float(exact(result.low_rank).norm()) < 1e-6 * float(exact(pair).norm())
    nothing = sum_terms([Term(pair, 0.0)], torch.float16, "layer")
    assert not exact(nothing.low_rank).any()
    assert (nothing.report.norm, nothing.report.error) == (0.0, 0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_change_of_a_tuned_layer_is_factored_again(shape: tuple[int, ...]) -> None:
    frame, moved = drawn(shape, 2, 0), drawn(shape, 2, 1)
    delta = Delta(frame, down=0.01 * moved.down, up=0.01 * moved.up)
    other = drawn(shape, 1, 2)
    result = sum_terms([Term(delta, 0.5), Term(other, -1.0)], torch.float32, "layer")
    expected = 0.5 * change(delta).double().flatten(1) - exact(other)
    assert error(result.low_rank, expected, float(expected.norm())) < 1e-6
    assert (result.low_rank.rank, result.low_rank.scale) == (5, 1.0)
    alone = sum_terms([Term(delta, 2.0)], torch.float32, "layer")
    assert error(alone.low_rank, 2 * change(delta).double().flatten(1), 1.0) < 1e-5
    assert alone.low_rank.rank == 4


def test_a_common_scale_stays_in_alpha() -> None:
    pairs = [drawn((12, 9), rank, rank, alpha=rank / 2, dtype=torch.float16) for rank in (2, 4)]
    result = concatenated(pairs)
    assert (result.rank, result.alpha, result.up.dtype) == (6, 3.0, torch.float16)
    assert torch.equal(result.up, torch.cat([pair.up for pair in pairs], dim=1))
    mixed = concatenated([pairs[0], replace(pairs[1], alpha=4.0)])
    assert (mixed.alpha, mixed.up.dtype, mixed.down.dtype) == (6.0, torch.float32, torch.float16)
    assert torch.equal(mixed.up[:, :2], pairs[0].up.float() / 2)
    wide = concatenated(
        [pairs[0], replace(pairs[1], down=pairs[1].down.bfloat16(), up=pairs[1].up.bfloat16())]
    )
    assert wide.up.dtype == wide.down.dtype == torch.float32


def test_values_outside_the_range_of_the_dtype_are_refused() -> None:
    pair = drawn((12, 9), 2, 0)
    huge = replace(pair, up=1e5 * pair.up)
    with pytest.raises(InputError, match=r"te1\.x: .* exceed the range of float16"):
        sum_terms([Term(huge, 1.0)], torch.float16, "te1.x")
