"""Find the largest singular vectors of a matrix by subspace iteration, faster than a full SVD.

They are the leading eigenvectors of the Gram matrix, which is only multiplied with and never computed. Random
start and Rayleigh-Ritz projection: Halko, Martinsson, Tropp 2011, alg. 4.4. Between two projections, a
Chebyshev polynomial damps the spectrum below the smallest Ritz value (Zhou, Saad 2006,
doi 10.1137/050630404). On the flat spectra of trained weights, this needs half the products of plain powers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.core.linalg import cholesky, eigh, solve_upper, thin_qr

ROUNDS = 6
OVERSAMPLING = 0.75  # additional directions, as a share of the rank
MIN_OVERSAMPLING = 16
MAX_DEGREE = 3
# Largest growth of the first direction relative to the last. With more, float32 loses the last direction.
MAX_GROWTH = 1e8
# Below this ratio to the largest diagonal entry of the Cholesky factor, a column is lost in rounding.
MIN_INDEPENDENCE = 1e-5


@dataclass(frozen=True)
class Subspace:
    """Approximate leading right singular vectors of a tall matrix, and their quality."""

    vectors: Tensor  # (columns, rank), orthonormal, float32
    excess: float  # estimate of (residual norm / smallest possible norm at this rank) - 1
    products: int  # number of products with the matrix and its transpose


@dataclass(frozen=True)
class _Ritz:
    vectors: Tensor  # (columns, width) orthonormal
    images: Tensor  # G @ vectors, where G = M^T M
    values: Tensor  # (width) float64 descending


def sketch_width(rank: int) -> int:
    """Return the number of directions that the iteration needs to find `rank` of them."""
    return rank + max(MIN_OVERSAMPLING, int(OVERSAMPLING * rank))


def leading_subspace(
    tall: Tensor, rank: int, *, energy: float, tolerance: float, working: torch.dtype, seed: int = 0
) -> Subspace | None:
    """Return the `rank` leading right singular vectors of `tall` (rows >= columns), or None if it fails.

    Products with the matrix are computed in `working`; bfloat16 is enough if its 8 bits resolve the decay of
    the spectrum. `energy` is the squared Frobenius norm of `tall`. The result is None if the estimated excess
    is above `tolerance` after the last round, or if a Ritz value is 0 or not finite.
    """
    matrix = tall.to(working)
    columns, width = tall.shape[1], sketch_width(rank)
    start = torch.randn(columns, width, generator=torch.Generator().manual_seed(seed)).to(tall.device)
    vectors = _orthonormal(_apply(matrix, start))
    products = 1
    for _ in range(ROUNDS):
        ritz = _project(matrix, vectors)
        products += 1
        excess = _estimated_excess(ritz, rank, energy)
        if excess is not None and excess <= tolerance:
            return Subspace(ritz.vectors[:, :rank].contiguous(), excess, products)
        if float(ritz.values[-1]) <= 0 or not bool(torch.isfinite(ritz.values).all()):
            return None
        degree = _degree(ritz)
        vectors = _orthonormal(_filtered(matrix, ritz, degree))
        products += degree - 1
    return None


def _apply(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Return G @ vectors in float32, G = M^T M."""
    return (matrix.T @ (matrix @ vectors.to(matrix.dtype))).float()


def _project(matrix: Tensor, vectors: Tensor) -> _Ritz:
    """Return the best approximate eigenvectors of G in the span of orthonormal `vectors` (Rayleigh-Ritz)."""
    halves = matrix @ vectors.to(matrix.dtype)  # (rows, width)
    # (M vectors)^T (M vectors), not vectors^T (G vectors): small values keep their relative accuracy
    wide = halves.float()
    values, rotation = eigh(wide.T @ wide)
    values, rotation = values.flip(0), rotation.flip(1).to(vectors.dtype)
    images = (matrix.T @ halves).float() @ rotation
    return _Ritz(vectors=vectors @ rotation, images=images, values=values)


def _estimated_excess(ritz: _Ritz, rank: int, energy: float) -> float | None:
    """Return the excess of the first `rank` Ritz vectors by the Kato-Temple bound; None if inapplicable.

    An eigenvalue exceeds its Ritz value by at most |residual|^2 / (Ritz value - rest of the spectrum)
    (Kato 1949). The smallest Ritz value is used for the rest of the spectrum. The excess of the norm is half
    of the ratio of the missed energy to the energy beyond `rank`.
    """
    values = ritz.values
    kept = values[:rank]
    residuals = ritz.images[:, :rank] - ritz.vectors[:, :rank] * kept.to(ritz.vectors.dtype)
    gaps = kept - values[-1]
    left = energy - float(kept.sum())
    # energy is a float32 sum: for an almost low-rank matrix, its rounding error exceeds the remaining energy
    if left <= 1e-6 * energy or bool((gaps <= 0).any()):
        return None
    # norms in float32 on the device, the final sums in float64
    squares = residuals.square().sum(0).to(gaps)
    missed = float((squares / gaps).sum())
    return 0.5 * missed / left


def _degree(ritz: _Ritz) -> int:
    """Return the highest degree whose filter amplifies the first direction by at most MAX_GROWTH."""
    ratio = 2 * float(ritz.values[0] / ritz.values[-1]) - 1
    return max(
        (degree for degree in range(2, MAX_DEGREE + 1) if (2 * ratio) ** degree / 2 <= MAX_GROWTH), default=1
    )


def _filtered(matrix: Tensor, ritz: _Ritz, degree: int) -> Tensor:
    """Return T_degree(2 G / bound - 1) @ v for every Ritz vector v; bound is the smallest Ritz value."""
    bound = float(ritz.values[-1])
    before, after = ritz.vectors, 2 / bound * ritz.images - ritz.vectors
    for _ in range(degree - 1):
        applied = 2 / bound * _apply(matrix, after) - after
        before, after = after, 2 * applied - before
    norms = after.square().sum(0).sqrt()
    return after / norms.clamp(min=torch.finfo(after.dtype).tiny)


def _orthonormal(columns: Tensor) -> Tensor:
    """Return an orthonormal basis of the span of the columns.

    Cholesky QR is several times faster than Householder QR for few columns. The small Gram matrix is factored
    in float64. Nearly dependent columns use Householder QR instead.
    """
    gram = columns.T @ columns
    lower = cholesky(gram)
    if lower is not None:
        diagonal = lower.diagonal()
        if float(diagonal.min()) > MIN_INDEPENDENCE * float(diagonal.max()):
            return solve_upper(columns, lower.T.to(columns.dtype))
    return thin_qr(columns)[0]
