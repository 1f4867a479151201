"""The matrix functions of torch.linalg that are used here, with types; torch leaves them without."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

_linalg: Any = torch.linalg


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u (m, k), s (k) descending, vh (k, n) with k = min(m, n)."""
    u, s, vh = cast("tuple[Tensor, Tensor, Tensor]", _linalg.svd(matrix, full_matrices=False))
    return u, s, vh


def thin_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """q (m, k) with orthonormal columns and r (k, n), k = min(m, n)."""
    q, r = cast("tuple[Tensor, Tensor]", _linalg.qr(matrix))
    return q, r


def eigenvectors(symmetric: Tensor) -> Tensor:
    """Orthonormal eigenvectors as columns (n, n), by ascending eigenvalue."""
    _, vectors = cast("tuple[Tensor, Tensor]", _linalg.eigh(symmetric))
    return vectors


def row_norms(matrix: Tensor) -> Tensor:
    """Euclidean norm of every row."""
    return cast("Tensor", _linalg.vector_norm(matrix, dim=1))


def norm(tensor: Tensor) -> float:
    """Euclidean (Frobenius) norm of all numbers, summed in float64."""
    return float(cast("Tensor", _linalg.vector_norm(tensor, dtype=torch.float64)))
