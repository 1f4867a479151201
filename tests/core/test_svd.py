"""The largest singular triplets, computed by every method."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectune.core.svd import Method, top_singular
from spectune.errors import InputError


def spectrum_matrix(rows: int, columns: int, *, power: float = 0.4, seed: int = 0) -> torch.Tensor:
    """Return a random matrix with singular values i**-power, like those of trained weights."""
    generator = torch.Generator().manual_seed(seed)
    small = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, small, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, small, generator=generator, dtype=torch.float64)).Q
    values = torch.arange(1, small + 1, dtype=torch.float64) ** -power
    return (left * values @ right.T).float()


@pytest.mark.parametrize("method", ["exact", "gram"])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (150, 200), (200, 150), (16, 16)])
def test_the_approximation_is_the_best_of_its_rank(shape: tuple[int, int], method: Method) -> None:
    matrix = spectrum_matrix(*shape)
    triplet = top_singular(matrix, 8, method)
    best = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(triplet.s.double(), best[:8], rtol=1e-5, atol=0)
    approximation = (triplet.u.double() * triplet.s) @ triplet.vh.double()
    error = torch.linalg.norm(matrix - approximation)
    assert error / torch.linalg.norm(best[8:]) - 1 < 1e-6
    eye = torch.eye(8)
    torch.testing.assert_close(triplet.u.T @ triplet.u, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(triplet.vh @ triplet.vh.T, eye, rtol=0, atol=1e-5)


@given(st.integers(2, 20), st.integers(2, 20), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_exact_and_gram_agree_including_signs(rows: int, columns: int, seed: int) -> None:
    matrix = spectrum_matrix(rows, columns, power=1.0, seed=seed)
    exact, gram = top_singular(matrix, 2, "exact"), top_singular(matrix, 2, "gram")
    torch.testing.assert_close(gram.s, exact.s, rtol=1e-5, atol=1e-6)
    top_two = exact.u.abs().topk(2, dim=0).values
    for column in range(2):
        if top_two[0, column] - top_two[1, column] > 1e-3:  # otherwise rounding decides the sign
            torch.testing.assert_close(gram.u[:, column], exact.u[:, column], rtol=0, atol=1e-4)
            torch.testing.assert_close(gram.vh[column], exact.vh[column], rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["exact", "gram", "sketch"])
def test_negating_a_matrix_negates_only_vh(method: Method) -> None:
    matrix = spectrum_matrix(30, 20)
    plus, minus = top_singular(matrix, 4, method), top_singular(-matrix, 4, method)
    torch.testing.assert_close(plus.u, minus.u, rtol=0, atol=1e-5)
    torch.testing.assert_close(plus.vh, -minus.vh, rtol=0, atol=1e-5)
    assert bool((plus.u.gather(0, plus.u.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("method", ["exact", "gram", "sketch"])
def test_the_same_matrix_gives_the_same_bits(method: Method) -> None:
    matrix = spectrum_matrix(64, 200)
    first, second = top_singular(matrix, 8, method), top_singular(matrix.clone(), 8, method)
    assert torch.equal(first.u, second.u)
    assert torch.equal(first.s, second.s)
    assert torch.equal(first.vh, second.vh)


@pytest.mark.parametrize("method", ["exact", "gram", "sketch"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_directions_beyond_the_true_rank_add_nothing(shape: tuple[int, int], method: Method) -> None:
    matrix = torch.outer(torch.linspace(-1, 1, shape[0]), torch.linspace(1, 2, shape[1]))
    triplet = top_singular(matrix, 5, method)
    approximation = (triplet.u * triplet.s) @ triplet.vh
    assert torch.isfinite(approximation).all()
    assert float(torch.linalg.norm(approximation - matrix) / torch.linalg.norm(matrix)) < 1e-6
    zero = top_singular(torch.zeros(shape), 5, method)
    assert not ((zero.u * zero.s) @ zero.vh).any()


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(InputError, match=r"unknown SVD method `grm`; did you mean `gram`\?"):
        top_singular(torch.eye(3), 1, "grm")  # type: ignore[arg-type]
