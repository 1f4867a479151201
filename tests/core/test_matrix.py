from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectune.core.delta import Delta, absolute, change, joined
from spectune.core.low_rank import LowRank, Product, from_matrix, product, to_factors, to_matrix, weight_shape

side = st.integers(1, 12)
linear_shapes = st.tuples(side, side)
conv_shapes = st.tuples(side, side, st.sampled_from([1, 3]), st.sampled_from([1, 3]))
shapes = st.one_of(linear_shapes, conv_shapes)
STORED = [torch.float16, torch.float32]


def random_low_rank(
    shape: tuple[int, ...],
    rank: int,
    *,
    seed: int = 0,
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    columns = int(torch.tensor(shape[1:]).prod())
    up = torch.randn(shape[0], rank, generator=generator)
    down = torch.randn(rank, columns, generator=generator)
    up, down = to_factors(up, down, shape)
    return LowRank(down=down.to(dtype), up=up.to(dtype), alpha=float(rank if alpha is None else alpha))


@given(shapes)
@settings(deadline=None, max_examples=50)
def test_a_weight_survives_the_way_to_a_matrix_and_back(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    matrix = to_matrix(weight)
    assert matrix.shape == (shape[0], weight.numel() // shape[0])
    assert torch.equal(from_matrix(matrix, shape), weight)


@given(shapes, st.integers(1, 5))
@settings(deadline=None, max_examples=50)
def test_factors_have_the_shapes_that_trainers_write(shape: tuple[int, ...], rank: int) -> None:
    low_rank = random_low_rank(shape, rank)
    assert low_rank.down.shape == (rank, *shape[1:])
    assert low_rank.up.shape == (shape[0], rank, *(1 for _ in shape[2:]))
    assert weight_shape(low_rank) == shape
    assert low_rank.down.is_contiguous()
    assert low_rank.up.is_contiguous()


@given(shapes, st.integers(1, 5), st.sampled_from([1.0, 0.5, 4.0]), st.sampled_from(STORED))
@settings(deadline=None, max_examples=50)
def test_the_product_agrees_with_float64(
    shape: tuple[int, ...], rank: int, scale: float, dtype: torch.dtype
) -> None:
    low_rank = random_low_rank(shape, rank, alpha=scale * rank, dtype=dtype)
    expected = scale * (to_matrix(low_rank.up).double() @ to_matrix(low_rank.down).double())
    actual = product(low_rank)
    assert (actual.dtype, actual.shape) == (torch.float32, shape)
    bound = rank * 2.0**-23 * scale * (to_matrix(low_rank.up).abs() @ to_matrix(low_rank.down).abs()).double()
    assert bool(((to_matrix(actual).double() - expected).abs() <= bound).all())


@given(shapes, st.integers(1, 4), st.sampled_from([1.0, 0.5]))
@settings(deadline=None, max_examples=50)
def test_a_tuned_change_is_the_difference_of_the_two_products(
    shape: tuple[int, ...], rank: int, scale: float
) -> None:
    frame = random_low_rank(shape, rank, seed=1, alpha=scale * rank)
    moved = random_low_rank(shape, rank, seed=2)
    delta = Delta(frame=frame, down=moved.down * 0.01, up=moved.up * 0.01)
    expected = product(absolute(delta)) - product(frame)
    assert joined(delta).scale == pytest.approx(scale)
    assert joined(delta).rank == 2 * rank
    torch.testing.assert_close(change(delta), expected, rtol=1e-4, atol=1e-5)


def test_a_change_of_zero_is_exactly_zero() -> None:
    frame = random_low_rank((7, 5, 3, 3), 4)
    delta = Delta(frame=frame, down=torch.zeros_like(frame.down), up=torch.zeros_like(frame.up))
    assert not change(delta).any()


def test_sums_in_float32_stay_within_their_bound_and_exact_ones_do_not_need_it() -> None:
    generator = torch.Generator().manual_seed(5)
    up, down = (
        torch.randn(40, 64, generator=generator).half(),
        torch.randn(64, 3000, generator=generator).half(),
    )
    low_rank = LowRank(down=down, up=up, alpha=64.0)
    wanted = up.double() @ down.double()
    fast = Product(low_rank, exact=False)
    of_rows, of_columns = fast.rounding()
    allowed = (
        torch.outer(of_rows, of_columns) / 2 + wanted.abs() * 2**-24
    )  # against the truth: one sum, one rounding
    found = torch.empty(40, 3000)
    for tile, numbers in fast.tiles():
        found[tile] = numbers
    error = (found.double() - wanted).abs()
    assert float(error.max()) > 0
    assert bool((error <= allowed).all())
    assert float((error / allowed).max()) > 1e-3  # a bound that says something
    assert torch.equal(product(low_rank), wanted.float())
