"""Low-rank factors, the shapes of their weights, and their product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectune.core.low_rank import (
    TILE_COLUMNS,
    TILE_ROWS,
    LowRank,
    Product,
    from_matrix,
    product,
    to_factors,
    to_matrix,
    weight_shape,
)

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
def test_to_matrix_and_from_matrix_are_inverses(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    matrix = to_matrix(weight)
    assert matrix.shape == (shape[0], weight.numel() // shape[0])
    assert torch.equal(from_matrix(matrix, shape), weight)


@given(shapes, st.integers(1, 5))
@settings(deadline=None, max_examples=50)
def test_factors_have_the_shapes_of_lora_files(shape: tuple[int, ...], rank: int) -> None:
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


def test_float32_sums_stay_within_their_bound_and_exact_sums_are_correctly_rounded() -> None:
    generator = torch.Generator().manual_seed(5)
    up, down = (
        torch.randn(40, 64, generator=generator).half(),
        torch.randn(64, 3000, generator=generator).half(),
    )
    low_rank = LowRank(down=down, up=up, alpha=64.0)
    expected = up.double() @ down.double()
    fast = Product(low_rank, exact=False)
    of_rows, of_columns = fast.rounding()
    allowed = (
        torch.outer(of_rows, of_columns) / 2 + expected.abs() * 2**-24
    )  # compared with the exact product: one rounding of one sum
    actual = torch.empty(40, 3000)
    for tile, values in fast.tiles():
        actual[tile] = values
    error = (actual.double() - expected).abs()
    assert float(error.max()) > 0
    assert bool((error <= allowed).all())
    assert float((error / allowed).max()) > 1e-3  # the bound is not much too large
    assert torch.equal(product(low_rank), expected.float())


@pytest.mark.parametrize("columns", [320, 1280, 2048, 2049, 2880])
@pytest.mark.parametrize("exact", [True, False])
def test_joined_tiles_have_the_values_of_separate_products(columns: int, *, exact: bool) -> None:
    """Files keep their bytes only if every product has the same size as before tiles were joined."""
    low_rank = random_low_rank((300, columns), 8, seed=columns)
    wide = torch.float64 if exact else torch.float32
    up, down = low_rank.up.to(wide), low_rank.down.to(wide)
    expected, seen = torch.empty(300, columns), torch.zeros(300, columns)
    for left in range(0, columns, TILE_COLUMNS):
        for top in range(0, 300, TILE_ROWS):
            part = down[:, left : left + TILE_COLUMNS].contiguous()
            expected[top : top + TILE_ROWS, left : left + TILE_COLUMNS] = up[top : top + TILE_ROWS] @ part
    for tile, values in Product(low_rank, exact=exact).tiles():
        assert torch.equal(values, expected[tile])
        assert seen[tile].is_contiguous() is (columns <= 2 * TILE_COLUMNS)
        seen[tile] += 1
    assert bool((seen == 1).all())
