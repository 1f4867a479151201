"""Typed wrappers of torch.linalg functions, norms, and scratch memory."""

from __future__ import annotations

import math
import threading
from typing import Any, cast

import torch
from torch import Tensor

_linalg: Any = torch.linalg
_PIECE = 1 << 18  # elements


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return u (m, k), s (k) descending and vh (k, n), k = min(m, n)."""
    u, s, vh = cast("tuple[Tensor, Tensor, Tensor]", _linalg.svd(matrix, full_matrices=False))
    return u, s, vh


def thin_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return q (m, k) with orthonormal columns and r (k, n), k = min(m, n)."""
    q, r = cast("tuple[Tensor, Tensor]", _linalg.qr(matrix))
    return q, r


def eigenvectors(symmetric: Tensor) -> Tensor:
    """Return orthonormal eigenvectors as columns (n, n), by ascending eigenvalue."""
    _, vectors = cast("tuple[Tensor, Tensor]", _linalg.eigh(symmetric))
    return vectors


def eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (n), ascending, and eigenvectors (n, n) of a small matrix, in float64 on its device.

    Runs on the CPU: a GPU is not faster for a few hundred rows, and not every GPU has float64.
    """
    small = symmetric.cpu().double()
    values, vectors = cast("tuple[Tensor, Tensor]", _linalg.eigh((small + small.T) / 2))
    if symmetric.device.type == "mps":
        values, vectors = values.float(), vectors.float()
    return values.to(symmetric.device), vectors.to(symmetric.device)


def cholesky(symmetric: Tensor) -> Tensor | None:
    """Return the lower Cholesky factor of a small matrix in float64; None if it is not positive definite."""
    lower, info = cast("tuple[Tensor, Tensor]", _linalg.cholesky_ex(symmetric.cpu().double()))
    if int(info) or not bool(torch.isfinite(lower).all()):
        return None
    return (lower.float() if symmetric.device.type == "mps" else lower).to(symmetric.device)


def solve_upper(matrix: Tensor, upper: Tensor) -> Tensor:
    """Return matrix @ inverse(upper) for an upper triangular matrix."""
    return cast("Tensor", _linalg.solve_triangular(upper, matrix, upper=True, left=False))


def row_norms(matrix: Tensor) -> Tensor:
    """Return the Euclidean norm of every row."""
    return cast("Tensor", _linalg.vector_norm(matrix, dim=1))


def column_norms(matrix: Tensor) -> Tensor:
    """Return the Euclidean norm of every column."""
    return matrix.square().sum(0).sqrt()


def largest_magnitude(tensor: Tensor) -> float:
    """Return the largest absolute value in one pass; NaN if the tensor contains NaN, 0 if it is empty."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor if tensor.dtype.itemsize >= 4 else tensor.float())
    # a sum keeps NaN; Python's max(NaN, x) depends on the order of its arguments
    return float("nan") if bool(torch.isnan(low + high)) else max(-float(low), float(high))


def norm(tensor: Tensor) -> float:
    """Return the Frobenius norm: sums each piece in float32, and the pieces in float64."""
    return math.sqrt(sum(square_sum(piece) for piece in pieces(tensor.float())))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected| in the Frobenius norm; 0 if both are equal."""
    difference, size = norm(actual.float() - expected.float()), norm(expected.float())
    if difference == 0.0:
        return 0.0
    return difference / size if size else float("inf")


def square_sum(tensor: Tensor) -> float:
    """Return the sum of squares in float32; use it only for up to a few 100,000 elements."""
    flat = tensor.reshape(-1)
    return float(torch.dot(flat, flat))


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return all elements of a tensor in flat pieces that fit into a CPU cache."""
    return torch.split(tensor.reshape(-1), _PIECE) if tensor.numel() else ()


# Each thread reuses its memory: allocating a megabyte costs more than filling it, because the system maps it
# page by page, and a checkpoint has ten thousand tiles.
_local = threading.local()


def scratch(use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialized tensor that is valid until this thread requests the same `use` again."""
    buffers: dict[tuple[str, torch.dtype], Tensor] = _local.__dict__.setdefault("buffers", {})
    numel = math.prod(shape)
    flat = buffers.get((use, dtype))
    if flat is None or flat.numel() < numel:
        flat = buffers[use, dtype] = torch.empty(numel, dtype=dtype)
    return flat[:numel].view(shape)


def scratch_copy(use: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of a tensor in scratch memory, as `dtype`."""
    return scratch(use, tuple(tensor.shape), dtype).copy_(tensor)
