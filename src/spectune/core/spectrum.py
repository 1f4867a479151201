"""All singular values of a weight without its singular vectors, and what they say of its ranks."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from spectune.core.linalg import largest_magnitude
from spectune.core.rounding import check_finite

DAMAGED = "the checkpoint is damaged or overflowed when it was saved; get it again or use its fp32 form"

# Up to this side the Gram matrix is summed in float64, which costs less there than its eigenvalues.
DOUBLE_SIDE = 512
# float32 sums of so many products are added up in float64: the error does not grow with the width.
BLOCK_COLUMNS = 1024
# Squares below this share of the largest are rounding of the Gram matrix and count as 0; for 1280 of them
# together that is an energy of less than 1e-4.
NOISE = {torch.float32: 2.0**-24, torch.float64: 2.0**-40}
DECAY_RANKS = 256

_linalg: Any = torch.linalg


def singular_values(matrix: Tensor, *, name: str = "weight") -> Tensor:
    """All singular values of a matrix (out, in), descending: float64 of shape (min(out, in)), on the CPU.

    They are the roots of the eigenvalues of the smaller Gram matrix. Energies are right to 1e-4 at any rank,
    single values to the rounding error of the largest: those below 3e-4 of it (1e-6 up to side 512) are 0.
    Raises InputError for NaN and infinite numbers.
    """
    check_finite(matrix, name, hint=DAMAGED)
    side = min(matrix.shape)
    scale = largest_magnitude(matrix)
    if scale == 0.0:
        return torch.zeros(side, dtype=torch.float64)
    working = torch.float64 if side <= DOUBLE_SIDE else torch.float32
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T  # (side, long)
    squares = _eigenvalues(_gram(short, scale, working)).flip(0)
    noise = NOISE[working] * squares[0]
    return torch.where(squares > noise, squares, 0.0).sqrt() * scale


def _gram(short: Tensor, scale: float, working: torch.dtype) -> Tensor:
    """M M^T / scale^2 in float64 from products in `working`; scaled, the squares of no weight overflow."""
    side = short.shape[0]
    gram = torch.zeros(side, side, dtype=torch.float64)
    for left in range(0, short.shape[1], BLOCK_COLUMNS):
        columns = short[:, left : left + BLOCK_COLUMNS].to(working) / scale  # (side, BLOCK_COLUMNS)
        gram += (columns @ columns.T).cpu()
    return gram


def _eigenvalues(symmetric: Tensor) -> Tensor:
    """Ascending; a third of what the eigenvectors would cost."""
    return cast("Tensor", _linalg.eigvalsh(symmetric))


def energy_curve(values: Tensor) -> Tensor:
    """Share of the squared Frobenius norm that the first 1, 2, ... directions hold: (len), rising to 1.

    Of a zero matrix nothing is missing: 1 at every rank.
    """
    captured = values.double().square().cumsum(0)
    total = float(captured[-1])
    return captured / total if total else torch.ones_like(captured)


def energy_at(curve: Tensor, rank: int) -> float:
    """The share at a rank; 0 at rank 0, 1 beyond the full rank."""
    return float(curve[min(rank, len(curve)) - 1]) if rank else 0.0


def decay_exponent(values: Tensor, ranks: int = DECAY_RANKS) -> float | None:
    """a of the power law s_i ~ i^-a: least squares of log s over log i, i = 1..`ranks`.

    Zero values end the fit; None where fewer than three are left.
    """
    positive = values[:ranks].double()
    positive = positive[positive > 0].log()
    if len(positive) < 3:
        return None
    steps = torch.arange(1, len(positive) + 1, dtype=torch.float64).log()
    centred = steps - steps.mean()
    return -float((centred * positive).sum() / centred.square().sum())
