"""The matrix functions of torch.linalg that are used here, with types; torch leaves them without."""

from __future__ import annotations

import math
import threading
from typing import Any, cast

import torch
from torch import Tensor

_linalg: Any = torch.linalg
_PIECE = 1 << 18  # numbers


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


def eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n) ascending and eigenvectors (n, n) of a small matrix, in float64 on its device.

    Computed on the CPU: a matrix of a few hundred rows is no work for a GPU, and not every one has float64.
    """
    small = symmetric.cpu().double()
    values, vectors = cast("tuple[Tensor, Tensor]", _linalg.eigh((small + small.T) / 2))
    if symmetric.device.type == "mps":
        values, vectors = values.float(), vectors.float()
    return values.to(symmetric.device), vectors.to(symmetric.device)


def cholesky(symmetric: Tensor) -> Tensor | None:
    """The lower Cholesky factor of a small matrix, in float64; None where it is not positive definite."""
    lower, info = cast("tuple[Tensor, Tensor]", _linalg.cholesky_ex(symmetric.cpu().double()))
    if int(info) or not bool(torch.isfinite(lower).all()):
        return None
    return (lower.float() if symmetric.device.type == "mps" else lower).to(symmetric.device)


def solve_upper(matrix: Tensor, upper: Tensor) -> Tensor:
    """matrix @ inverse(upper) for an upper triangular matrix."""
    return cast("Tensor", _linalg.solve_triangular(upper, matrix, upper=True, left=False))


def row_norms(matrix: Tensor) -> Tensor:
    """Euclidean norm of every row."""
    return cast("Tensor", _linalg.vector_norm(matrix, dim=1))


def largest_magnitude(tensor: Tensor) -> float:
    """The largest absolute value, one pass; NaN where there is one, 0 for an empty tensor."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor if tensor.dtype.itemsize >= 4 else tensor.float())
    # max(NaN, x) depends on the order of its arguments, a sum does not
    return float("nan") if bool(torch.isnan(low + high)) else max(-float(low), float(high))


def column_norms(matrix: Tensor) -> Tensor:
    """Euclidean norm of every column."""
    return matrix.square().sum(0).sqrt()


def norm(tensor: Tensor) -> float:
    """Euclidean (Frobenius) norm of all numbers; pieces are summed in float32, their sums in float64."""
    return math.sqrt(sum(square_sum(piece) for piece in pieces(tensor.float())))


def square_sum(tensor: Tensor) -> float:
    """The sum of the squares of not too many numbers, in float32."""
    flat = tensor.reshape(-1)
    return float(torch.dot(flat, flat))


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """All numbers of a tensor in flat pieces that fit into a processor's cache."""
    return torch.split(tensor.reshape(-1), _PIECE) if tensor.numel() else ()


# A fresh megabyte costs more than filling it: the system hands out pages one by one, and a checkpoint has ten
# thousand tiles. Each thread reuses its own memory.
_local = threading.local()


def scratch(use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor, whose numbers last until this thread asks for the same use again."""
    kept: dict[tuple[str, torch.dtype], Tensor] = _local.__dict__.setdefault("kept", {})
    numel = 1
    for length in shape:
        numel *= length
    flat = kept.get((use, dtype))
    if flat is None or flat.numel() < numel:
        flat = kept[use, dtype] = torch.empty(numel, dtype=dtype)
    return flat[:numel].view(shape)


def converted(use: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in scratch memory, in another type."""
    return scratch(use, tuple(tensor.shape), dtype).copy_(tensor)
