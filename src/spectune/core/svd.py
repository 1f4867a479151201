"""The largest singular triplets of a matrix: the only place where u, s and vh have names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from spectune.core.linalg import column_norms, eigenvectors, eigh, norm, row_norms, thin_svd
from spectune.core.sketch import leading_subspace, width_of
from spectune.errors import InputError, did_you_mean

Method = Literal["auto", "exact", "gram", "sketch"]

# Below this many rows or columns the thin SVD takes milliseconds, so nothing is saved by avoiding it.
SMALL_SIDE = 128
# Up to this side the eigenproblem is solved in float64, which costs less there than reading the tensor.
DOUBLE_SIDE = 512
# A sketch carries so many directions less than the matrix has, or the whole eigenproblem is cheaper.
SKETCH_FACTOR = 2.5
# Estimated excess at which a sketch is accepted. The estimate is up to a third below the truth.
TOLERANCE = 5e-4


@dataclass(frozen=True)
class Triplet:
    """u (out, rank), s (rank) descending, vh (rank, in): u diag(s) vh approximates the matrix.

    `excess` is (norm of what is left / the smallest that any matrix of this rank leaves) - 1, estimated where
    the method is not exact; `method` is the one that the result came from.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    method: Method
    excess: float = 0.0


def top_singular(matrix: Tensor, rank: int, method: Method = "auto", *, size: float | None = None) -> Triplet:
    """The `rank` largest singular triplets of a float32 matrix of shape (out, in), with settled signs.

    auto takes the exact SVD for small matrices, a sketch where few directions are wanted of many, and the
    Gram matrix of the shorter side otherwise and where the sketch misses its bound.
    `size` is the Frobenius norm of the matrix, if it is known.
    The same matrix on the same machine gives the same triplets: the sketch starts from fixed random numbers.
    """
    if method not in get_args(Method):
        known = get_args(Method)
        raise InputError(
            f"unknown SVD method `{method}`{did_you_mean(method, known)}", hint=f"known: {', '.join(known)}"
        )
    assert 1 <= rank <= min(matrix.shape), f"rank {rank} of a matrix of shape {tuple(matrix.shape)}"
    matrix = matrix.float()
    if method == "auto":
        method = cheapest(tuple(matrix.shape), rank)
    if method == "sketch":
        sketched = _sketch(matrix, rank, (norm(matrix) if size is None else size) ** 2)
        if sketched is not None:
            return _settle_signs(sketched)
        method = "gram"
    return _settle_signs(_exact(matrix, rank) if method == "exact" else _gram(matrix, rank))


def cheapest(shape: tuple[int, ...], rank: int) -> Method:
    """The method that costs least for a matrix of this shape."""
    side = min(shape)
    if side <= SMALL_SIDE:
        return "exact"
    return "sketch" if SKETCH_FACTOR * width_of(rank) <= side else "gram"


def _exact(matrix: Tensor, rank: int) -> Triplet:
    """Thin SVD, cut after `rank` triplets; the transpose is several times faster for wide matrices."""
    if matrix.shape[0] < matrix.shape[1]:
        v, s, uh = thin_svd(matrix.T)
        u, vh = uh[:rank].T.contiguous(), v[:, :rank].T.contiguous()
        return Triplet(u=u, s=s[:rank].clone(), vh=vh, method="exact")
    u, s, vh = thin_svd(matrix)
    return Triplet(u=u[:, :rank].contiguous(), s=s[:rank].clone(), vh=vh[:rank].clone(), method="exact")


def _gram(matrix: Tensor, rank: int) -> Triplet:
    """Eigenvectors of the smaller Gram matrix; the values come from the matrix itself.

    Squaring halves the digits of small singular values, but only the subspace is taken from the
    square: u (u^T M) is the projection of M whatever the eigenvalues were.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return _flipped(_gram(matrix.T, rank))
    # float32 at least: a bf16 Gram matrix loses singular values below s_max/16
    small = matrix.shape[0] <= DOUBLE_SIDE and matrix.device.type != "mps"
    wide = matrix.double() if small else matrix
    vectors = eigenvectors(wide @ wide.T)  # (out, out), ascending
    u = vectors[:, -rank:].flip(1)  # (out, rank)
    projected = u.T @ wide  # (rank, in), row i has norm s_i
    s = row_norms(projected)
    s, order = s.sort(descending=True, stable=True)
    vh = projected[order] / _divisor(s)[:, None]
    return Triplet(u=u[:, order].float().contiguous(), s=s.float(), vh=vh.float().contiguous(), method="gram")


def _sketch(matrix: Tensor, rank: int, energy: float) -> Triplet | None:
    """From a subspace iteration; None where its estimated excess stays above the tolerance."""
    if matrix.shape[0] < matrix.shape[1]:
        flipped = _sketch(matrix.T, rank, energy)
        return None if flipped is None else _flipped(flipped)
    found = None
    for working in dict.fromkeys((fast_dtype(matrix.device.type), torch.float32)):
        found = leading_subspace(matrix, rank, energy=energy, tolerance=TOLERANCE, working=working)
        if found is not None:
            break
    if found is None:
        return None
    projected = matrix @ found.vectors  # (out, rank)
    _, rotation = eigh(projected.T @ projected)
    rotation = rotation.flip(1).to(matrix.dtype)
    scaled = projected @ rotation  # column i has norm s_i
    s = column_norms(scaled)
    vh = (found.vectors @ rotation).T
    s, order = s.sort(descending=True, stable=True)
    u = scaled[:, order] / _divisor(s)
    return Triplet(u=u, s=s, vh=vh[order].contiguous(), method="sketch", excess=found.excess)


def _divisor(s: Tensor) -> Tensor:
    """The singular values with ones for zeros: a zero row has no direction and stays zero."""
    return torch.where(s > 0, s, 1)


def _flipped(triplet: Triplet) -> Triplet:
    """The triplets of the transposed matrix."""
    u, vh = triplet.vh.T.contiguous(), triplet.u.T.contiguous()
    return Triplet(u=u, s=triplet.s, vh=vh, method=triplet.method, excess=triplet.excess)


@cache
def fast_dtype(device_type: str) -> torch.dtype:
    """The type in which this device multiplies fastest; bfloat16 only where its hardware has units for it."""
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device_type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # older than torch 2.10
        return torch.float32
    capabilities = cast("dict[str, object]", torch.cpu.get_capabilities())
    has_units = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if has_units else torch.float32


def settled_signs(u: Tensor) -> Tensor:
    """Signs (rank) that make the largest entry of each column positive; the first of equals decides."""
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0)


def _settle_signs(triplet: Triplet) -> Triplet:
    sign = settled_signs(triplet.u)
    return Triplet(
        u=triplet.u * sign,
        s=triplet.s,
        vh=triplet.vh * sign[:, None],
        method=triplet.method,
        excess=triplet.excess,
    )
