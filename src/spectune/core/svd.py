"""Compute the largest singular triplets of a matrix by the exact SVD, a Gram matrix, or a sketch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from spectune.core.linalg import column_norms, eigenvectors, eigh, norm, row_norms, thin_svd
from spectune.core.sketch import leading_subspace, sketch_width
from spectune.errors import InputError, did_you_mean

Method = Literal["auto", "exact", "gram", "sketch"]

# Up to this many rows or columns, the thin SVD takes milliseconds, and other methods are not faster.
SMALL_SIDE = 128
# Up to this side length, the eigenproblem is solved in float64: it costs less than reading the tensor.
DOUBLE_SIDE = 512
# If a sketch is not this many times narrower than the matrix, the full eigenproblem is faster.
SKETCH_FACTOR = 2.5
# Largest estimated excess of an accepted sketch. The estimate is up to a third too low.
TOLERANCE = 5e-4


@dataclass(frozen=True)
class Triplet:
    """Singular triplets: u diag(s) vh approximates the matrix."""

    u: Tensor  # (out, rank)
    s: Tensor  # (rank), descending
    vh: Tensor  # (rank, in)
    method: Method  # that computed the triplets
    excess: float = 0.0  # estimate of (residual norm / smallest residual norm at this rank) - 1


def top_singular(matrix: Tensor, rank: int, method: Method = "auto", *, size: float | None = None) -> Triplet:
    """Return the `rank` largest singular triplets of a float32 matrix (out, in), with canonical signs.

    `auto` uses the exact SVD for small matrices, a sketch for a few of many directions, and otherwise the
    Gram matrix of the shorter side. If a sketch misses its tolerance, the Gram matrix is used. `size` is the
    Frobenius norm of the matrix, if known. The sketch has a fixed seed, so a machine always computes the same
    triplets for a matrix.
    """
    if method not in get_args(Method):
        known = get_args(Method)
        raise InputError(
            f"unknown SVD method `{method}`{did_you_mean(method, known)}",
            hint=f"expected one of {', '.join(known)}",
        )
    assert 1 <= rank <= min(matrix.shape), f"rank {rank} of a matrix of shape {tuple(matrix.shape)}"
    matrix = matrix.float()
    if method == "auto":
        method = cheapest_method(tuple(matrix.shape), rank)
    if method == "sketch":
        sketched = _sketch(matrix, rank, (norm(matrix) if size is None else size) ** 2)
        if sketched is not None:
            return _with_canonical_signs(sketched)
        method = "gram"
    return _with_canonical_signs(_exact(matrix, rank) if method == "exact" else _gram(matrix, rank))


def cheapest_method(shape: tuple[int, ...], rank: int) -> Method:
    """Return the fastest method for a matrix of this shape."""
    side = min(shape)
    if side <= SMALL_SIDE:
        return "exact"
    return "sketch" if SKETCH_FACTOR * sketch_width(rank) <= side else "gram"


def _exact(matrix: Tensor, rank: int) -> Triplet:
    """Compute the thin SVD; the transpose is several times faster for wide matrices."""
    if matrix.shape[0] < matrix.shape[1]:
        v, s, uh = thin_svd(matrix.T)
        u, vh = uh[:rank].T.contiguous(), v[:, :rank].T.contiguous()
        return Triplet(u=u, s=s[:rank].clone(), vh=vh, method="exact")
    u, s, vh = thin_svd(matrix)
    return Triplet(u=u[:, :rank].contiguous(), s=s[:rank].clone(), vh=vh[:rank].clone(), method="exact")


def _gram(matrix: Tensor, rank: int) -> Triplet:
    """Compute u from the smaller Gram matrix, and s and vh from the matrix itself.

    Squaring halves the number of digits of small singular values. This affects only the subspace: u (u^T M)
    is a projection of M for any u.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return _flipped(_gram(matrix.T, rank))
    # at least float32: a bf16 Gram matrix loses singular values below s_max/16
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
    """Compute triplets by subspace iteration; return None if it does not reach the tolerance."""
    if matrix.shape[0] < matrix.shape[1]:
        flipped = _sketch(matrix.T, rank, energy)
        return None if flipped is None else _flipped(flipped)
    subspace = None
    for working in dict.fromkeys((fast_dtype(matrix.device.type), torch.float32)):
        subspace = leading_subspace(matrix, rank, energy=energy, tolerance=TOLERANCE, working=working)
        if subspace is not None:
            break
    if subspace is None:
        return None
    projected = matrix @ subspace.vectors  # (out, rank)
    _, rotation = eigh(projected.T @ projected)
    rotation = rotation.flip(1).to(matrix.dtype)
    scaled = projected @ rotation  # column i has norm s_i
    s = column_norms(scaled)
    vh = (subspace.vectors @ rotation).T
    s, order = s.sort(descending=True, stable=True)
    u = scaled[:, order] / _divisor(s)
    return Triplet(u=u, s=s, vh=vh[order].contiguous(), method="sketch", excess=subspace.excess)


def _divisor(s: Tensor) -> Tensor:
    """Return the singular values with zeros replaced by ones, so that a zero row stays zero."""
    return torch.where(s > 0, s, 1)


def _flipped(triplet: Triplet) -> Triplet:
    """Return the triplets of the transposed matrix."""
    u, vh = triplet.vh.T.contiguous(), triplet.u.T.contiguous()
    return Triplet(u=u, s=triplet.s, vh=vh, method=triplet.method, excess=triplet.excess)


@cache
def fast_dtype(device_type: str) -> torch.dtype:
    """Return the fastest dtype for products on a device: bfloat16 if the hardware supports it."""
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device_type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # new in torch 2.10
        return torch.float32
    capabilities = cast("dict[str, object]", torch.cpu.get_capabilities())
    has_units = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if has_units else torch.float32


def canonical_signs(u: Tensor) -> Tensor:
    """Return signs (rank) that make the largest entry of each column positive (the first if equal)."""
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0)


def _with_canonical_signs(triplet: Triplet) -> Triplet:
    sign = canonical_signs(triplet.u)
    return Triplet(
        u=triplet.u * sign,
        s=triplet.s,
        vh=triplet.vh * sign[:, None],
        method=triplet.method,
        excess=triplet.excess,
    )
