"""Compute all singular values of a weight, without singular vectors, and measure their decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from spectune.core.linalg import largest_magnitude
from spectune.core.low_rank import to_matrix
from spectune.core.rounding import check_finite

DAMAGED = "the checkpoint is damaged or was saved with overflow: download it again or use its fp32 version"

# Up to this side length, the Gram matrix is summed in float64: it costs less than the eigenvalues.
DOUBLE_SIDE = 512
# Blocks of this many columns are summed in float32, their sums in float64, so that the error does not grow
# with the width.
BLOCK_COLUMNS = 1024
# Squares below this share of the largest are rounding errors of the Gram matrix and count as 0. The energy of
# 1280 of them together is below 1e-4.
NOISE = {torch.float32: 2.0**-24, torch.float64: 2.0**-40}
DECAY_RANKS = 256

_linalg: Any = torch.linalg


def singular_values(matrix: Tensor, *, name: str = "weight") -> Tensor:
    """Return all singular values of a matrix (out, in), descending, as float64 (min(out, in)) on the CPU.

    They are the square roots of the eigenvalues of the smaller Gram matrix. Energies are accurate to 1e-4 at
    any rank. Single values are accurate to the rounding error of the largest: values below 3e-4 of it (1e-6
    up to side 512) are 0. Raises InputError for NaN and infinity.
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
    """Return M M^T / scale^2 in float64 from products in `working`; without scale, squares could overflow."""
    side = short.shape[0]
    gram = torch.zeros(side, side, dtype=torch.float64)
    for left in range(0, short.shape[1], BLOCK_COLUMNS):
        columns = short[:, left : left + BLOCK_COLUMNS].to(working) / scale  # (side, BLOCK_COLUMNS)
        gram += (columns @ columns.T).cpu()
    return gram


def _eigenvalues(symmetric: Tensor) -> Tensor:
    """Return the eigenvalues, ascending; this takes a third of the time of eigenvectors."""
    return cast("Tensor", _linalg.eigvalsh(symmetric))


def energy_curve(values: Tensor) -> Tensor:
    """Return the share of the squared Frobenius norm in the first 1, 2, ..., n directions, rising to 1.

    A zero matrix has share 1 at every rank.
    """
    captured = values.double().square().cumsum(0)
    total = float(captured[-1])
    return captured / total if total else torch.ones_like(captured)


def energy_at(curve: Tensor, rank: int) -> float:
    """Return the share of energy at a rank; 0 at rank 0, 1 at and above the full rank."""
    return float(curve[min(rank, len(curve)) - 1]) if rank else 0.0


def squares_at(weight: Tensor, ranks: Sequence[int]) -> Tensor:
    """Return the squared norm that the first directions of a weight hold at each rank, float64 (ranks,)."""
    squares = singular_values(to_matrix(weight)).square().cumsum(0)
    return torch.stack([squares[min(rank, len(squares)) - 1] for rank in ranks])


def decay_exponent(values: Tensor, ranks: int = DECAY_RANKS) -> float | None:
    """Return the exponent a of the power law s_i ~ i^-a: least squares of log s over log i, i = 1..`ranks`.

    The fit uses only positive values. The result is None with fewer than three of them.
    """
    positive = values[:ranks].double()
    positive = positive[positive > 0].log()
    if len(positive) < 3:
        return None
    steps = torch.arange(1, len(positive) + 1, dtype=torch.float64).log()
    centered = steps - steps.mean()
    return -float((centered * positive).sum() / centered.square().sum())
