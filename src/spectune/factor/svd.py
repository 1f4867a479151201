"""The largest singular triplets of a matrix: the only place where u, s and vh have names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from spectune.errors import InputError, did_you_mean
from spectune.factor.linalg import eigenvectors, row_norms, thin_svd

Method = Literal["auto", "exact", "gram"]

# Below this many rows or columns the thin SVD takes milliseconds, so nothing is saved by avoiding it.
SMALL_SIDE = 128
# Up to this side the eigenproblem is solved in float64, which costs less there than reading the tensor.
DOUBLE_SIDE = 512


@dataclass(frozen=True)
class Triplet:
    """u (out, rank), s (rank) descending, vh (rank, in): the best approximation u diag(s) vh of its rank."""

    u: Tensor
    s: Tensor
    vh: Tensor


def top_singular(matrix: Tensor, rank: int, method: Method = "auto") -> Triplet:
    """The `rank` largest singular triplets of a float32 matrix of shape (out, in), with settled signs.

    auto takes the exact SVD for small matrices and the Gram matrix of the shorter side for all others.
    The same matrix on the same machine gives the same triplets: nothing here is random.
    """
    if method not in get_args(Method):
        known = get_args(Method)
        raise InputError(
            f"unknown SVD method `{method}`{did_you_mean(method, known)}", hint=f"known: {', '.join(known)}"
        )
    assert 1 <= rank <= min(matrix.shape), f"rank {rank} of a matrix of shape {tuple(matrix.shape)}"
    matrix = matrix.float()
    if method == "auto":
        method = "exact" if min(matrix.shape) <= SMALL_SIDE else "gram"
    return _settle_signs(_exact(matrix, rank) if method == "exact" else _gram(matrix, rank))


def _exact(matrix: Tensor, rank: int) -> Triplet:
    """Thin SVD, cut after `rank` triplets; the transpose is several times faster for wide matrices."""
    if matrix.shape[0] < matrix.shape[1]:
        v, s, uh = thin_svd(matrix.T)
        return Triplet(u=uh[:rank].T.contiguous(), s=s[:rank].clone(), vh=v[:, :rank].T.contiguous())
    u, s, vh = thin_svd(matrix)
    return Triplet(u=u[:, :rank].contiguous(), s=s[:rank].clone(), vh=vh[:rank].clone())


def _gram(matrix: Tensor, rank: int) -> Triplet:
    """Eigenvectors of the smaller Gram matrix; the values come from the matrix itself.

    Squaring halves the digits of small singular values, but only the subspace is taken from the
    square: u (u^T M) is the projection of M whatever the eigenvalues were.
    """
    if matrix.shape[0] > matrix.shape[1]:
        flipped = _gram(matrix.T, rank)
        return Triplet(u=flipped.vh.T.contiguous(), s=flipped.s, vh=flipped.u.T.contiguous())
    # float32 at least: a bf16 Gram matrix loses singular values below s_max/16
    wide = matrix.double() if matrix.shape[0] <= DOUBLE_SIDE else matrix
    vectors = eigenvectors(wide @ wide.T)  # (out, out), ascending
    u = vectors[:, -rank:].flip(1)  # (out, rank)
    projected = u.T @ wide  # (rank, in), row i has norm s_i
    s = row_norms(projected)
    s, order = s.sort(descending=True, stable=True)
    # A zero row has no direction; it stays zero, and so does its product.
    vh = projected[order] / torch.where(s > 0, s, 1)[:, None]
    return Triplet(u=u[:, order].float().contiguous(), s=s.float(), vh=vh.float().contiguous())


def settled_signs(u: Tensor) -> Tensor:
    """Signs (rank) that make the largest entry of each column positive; the first of equals decides."""
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0)


def _settle_signs(triplet: Triplet) -> Triplet:
    sign = settled_signs(triplet.u)
    return Triplet(u=triplet.u * sign, s=triplet.s, vh=triplet.vh * sign[:, None])
