"""Typed wrappers of torch.linalg functions, norms, and scratch memory."""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

_linalg: Any = torch.linalg
_PIECE = 1 << 18  # elements


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return u (m, k), s (k) descending and vh (k, n), k = min(m, n)."""
    u, s, vh = cast("tuple[Tensor, Tensor, Tensor]", _linalg.svd(_solvable(matrix), full_matrices=False))
    return u.to(matrix.device), s.to(matrix.device), vh.to(matrix.device)


def thin_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return q (m, k) with orthonormal columns and r (k, n), k = min(m, n)."""
    q, r = cast("tuple[Tensor, Tensor]", _linalg.qr(_solvable(matrix)))
    return q.to(matrix.device), r.to(matrix.device)


def eigenvectors(symmetric: Tensor) -> Tensor:
    """Return orthonormal eigenvectors as columns (n, n), by ascending eigenvalue."""
    _, vectors = cast("tuple[Tensor, Tensor]", _linalg.eigh(_solvable(symmetric)))
    return vectors.to(symmetric.device)


def _solvable(matrix: Tensor) -> Tensor:
    """Return the matrix on a device where torch has decompositions: the GPU of a Mac lacks most of them."""
    return matrix.cpu() if matrix.device.type == "mps" else matrix


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
    solved = _linalg.solve_triangular(_solvable(upper), _solvable(matrix), upper=True, left=False)
    return cast("Tensor", solved).to(matrix.device)


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
    if tensor.dtype != dtype and not tensor.is_contiguous():
        tensor = scratch("rows", tuple(tensor.shape), tensor.dtype).copy_(tensor)
    return scratch(use, tuple(tensor.shape), dtype).copy_(tensor)


def packed(use: str, tensor: Tensor) -> Tensor:
    """Return a contiguous tensor unchanged, and another one as a copy in scratch memory."""
    return tensor if tensor.is_contiguous() else scratch_copy(use, tensor, tensor.dtype)


def copy_into(result: Tensor, tensor: Tensor) -> None:
    """Copy a tensor into another one, which may have another dtype."""
    # converting rows that lie apart takes several times as long as copying them
    if tensor.dtype != result.dtype and not result.is_contiguous() and result.device.type == "cpu":
        tensor = scratch_copy("rows", tensor, result.dtype)
    result.copy_(tensor)


class _Recycler:
    """Memory blocks of tensors that no longer exist, for new tensors.

    The blocks are free until `empty` takes the smallest one that fits. While `recycled_memory` is active, the
    block of a tensor becomes free when the tensor and all its views are gone.
    """

    SMALLEST = 1 << 17  # bytes; malloc itself keeps the memory of smaller tensors
    KEPT = 1 << 28  # most bytes of free blocks; the oldest ones go back to the system

    def __init__(self) -> None:
        self.users = 0  # number of active `recycled_memory`
        self._lock = threading.Lock()
        self._returned: deque[Tensor] = deque()  # blocks of dead tensors that are not in `_free` yet
        self._free: list[Tensor] = []  # oldest first

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        if not self.users or nbytes < self.SMALLEST:
            return torch.empty(shape, dtype=dtype)
        block = self._take(nbytes)
        # the storage of the tensor owns this array object, so both die together
        owner = block.numpy()[:nbytes]
        weakref.finalize(owner, self._give_back, block).atexit = False
        return cast("Any", torch).from_numpy(owner).view(dtype).view(shape)

    def begin(self) -> None:
        with self._lock:
            self.users += 1

    def end(self) -> None:
        with self._lock:
            self.users -= 1
            if not self.users:
                self._returned.clear()
                self._free.clear()

    def _give_back(self, block: Tensor) -> None:
        # no lock: a tensor can die at any time, also in a thread that holds the lock
        if self.users:
            self._returned.append(block)

    def _take(self, nbytes: int) -> Tensor:
        with self._lock:
            while self._returned:
                self._free.append(self._returned.popleft())
            fitting = [i for i, block in enumerate(self._free) if nbytes <= block.numel() <= 4 * nbytes]
            if fitting:
                return self._free.pop(min(fitting, key=lambda i: self._free[i].numel()))
            kept = sum(block.numel() for block in self._free)
            while kept > self.KEPT:
                kept -= self._free.pop(0).numel()
        # a power of two fits more later tensors; the system provides only the pages that are used
        return torch.empty(1 << (nbytes - 1).bit_length(), dtype=torch.uint8)


_recycler = _Recycler()


@contextmanager
def recycled_memory() -> Generator[None]:
    """Let `empty` reuse the memory of its earlier tensors until the end of this block, in all threads."""
    _recycler.begin()
    try:
        yield
    finally:
        _recycler.end()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialized tensor on the CPU, in memory of a dead tensor within `recycled_memory`."""
    return _recycler.empty(shape, dtype)


def new_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of a tensor as `dtype`, in memory from `empty`."""
    return empty(tuple(tensor.shape), dtype).copy_(tensor)
