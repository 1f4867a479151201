"""Compare the sketch with the exact SVD: its bound, its estimate, and its fallback."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectune.core.sketch import leading_subspace
from spectune.core.svd import TOLERANCE, cheapest_method, top_singular


def spectrum(rows: int, columns: int, power: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a matrix with singular values i ** -power, and these values."""
    generator = torch.Generator().manual_seed(seed)
    side = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, side, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(columns, side, generator=generator))[0]
    values = torch.arange(1, side + 1).float() ** -power
    return (left * values) @ right.T, values


def excess(matrix: Tensor, approximation: Tensor, values: Tensor, rank: int) -> float:
    left = float((matrix.double() - approximation.double()).norm())
    return left / float(values[rank:].double().norm()) - 1


@pytest.mark.parametrize("shape", [(320, 320), (640, 256), (256, 900)])
@pytest.mark.parametrize("power", [0.15, 0.3, 0.5, 1.0])
def test_auto_stays_within_a_thousandth_of_the_best(shape: tuple[int, int], power: float) -> None:
    matrix, values = spectrum(*shape, power)
    triplet = top_singular(matrix, 24)
    assert triplet.method in ("sketch", "gram")
    actual = excess(matrix, (triplet.u * triplet.s) @ triplet.vh, values, 24)
    assert -1e-5 < actual < 1e-3
    assert actual < 2 * triplet.excess + 2e-5
    eye = torch.eye(24)
    torch.testing.assert_close(triplet.u.T @ triplet.u, eye, rtol=0, atol=1e-4)
    torch.testing.assert_close(triplet.vh @ triplet.vh.T, eye, rtol=0, atol=1e-4)


@pytest.mark.parametrize("working", [torch.float32, torch.bfloat16])
def test_the_estimated_excess_is_close_to_the_true_one(working: torch.dtype) -> None:
    matrix, values = spectrum(640, 384, 0.3)
    energy = float(values.square().sum())
    subspace = leading_subspace(matrix, 32, energy=energy, tolerance=5e-3, working=working)
    assert subspace is not None
    truth = excess(matrix, matrix @ subspace.vectors @ subspace.vectors.T, values, 32)
    assert 0.5 * truth < subspace.excess < 2 * truth
    assert truth > 1e-6  # the comparison is above rounding


def test_an_unreachable_tolerance_gives_none() -> None:
    matrix, values = spectrum(640, 384, 0.3)
    energy = float(values.square().sum())
    assert leading_subspace(matrix, 32, energy=energy, tolerance=1e-13, working=torch.bfloat16) is None


def test_auto_falls_back_to_the_gram_matrix_if_the_sketch_fails() -> None:
    low_rank = torch.outer(torch.linspace(-1, 1, 400), torch.linspace(1, 2, 300))
    assert cheapest_method((400, 300), 16) == "sketch"
    triplet = top_singular(low_rank, 16)
    assert triplet.method == "gram"
    assert float(((triplet.u * triplet.s) @ triplet.vh - low_rank).norm() / low_rank.norm()) < 1e-5
    assert not top_singular(torch.zeros(400, 300), 16).s.any()


@pytest.mark.parametrize(
    ("shape", "rank", "method"),
    [
        ((1280, 1280), 64, "sketch"),
        ((1280, 11520), 128, "sketch"),
        ((256, 1280), 64, "gram"),
        ((1280, 1280), 512, "gram"),
        ((100, 1280), 8, "exact"),
    ],
)
def test_the_method_follows_shape_and_rank(shape: tuple[int, int], rank: int, method: str) -> None:
    assert cheapest_method(shape, rank) == method


def test_the_tolerance_allows_for_an_estimate_that_is_too_low() -> None:
    assert TOLERANCE * 1.5 <= 1e-3
