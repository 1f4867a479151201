"""Compute the frame (A0, B0) of one weight from the weight or its shape, without data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectune.core.linalg import eigenvectors, row_norms
from spectune.core.low_rank import LowRank, to_factors, to_matrix
from spectune.core.rank import full_rank
from spectune.core.rounding import check_dtype, check_finite
from spectune.core.spectrum import DAMAGED
from spectune.core.split import split_weight
from spectune.core.svd import canonical_signs

# The length of a row of A0 in plain LoRA: a uniform value in +-1/sqrt(n) has the variance 1/(3n).
UNIT_LENGTH = 1 / math.sqrt(3)
# The rank at which both scalings of the change are equal.
REFERENCE_RANK = 16


def principal_frame(weight: Tensor, *, rank: int, name: str = "weight") -> LowRank:
    """Return B0 = U_r sqrt(S_r) and A0 = sqrt(S_r) V_r^T of the largest singular values, float32."""
    # float32: the tuned file stores the frame, so the frame need not equal that of a 16-bit principal file
    device = weight.device
    return split_weight(weight, rank=rank, store=torch.float32, device=device, name=name).low_rank


def minor_frame(weight: Tensor, *, rank: int, name: str = "weight") -> LowRank:
    """Return B0 = U sqrt(S) and A0 = sqrt(S) V^T of the `rank` smallest singular values, float32.

    weight is (out, in) or (out, in, kh, kw). At full rank this is the principal frame. From MiLoRA (Wang et
    al. 2024, arXiv 2406.09044). Raises InputError like `split_weight`.
    """
    shape = tuple(weight.shape)
    if rank >= full_rank(shape):
        return principal_frame(weight, rank=rank, name=name)
    check_dtype(weight.dtype, name)
    check_finite(weight, name, hint=DAMAGED)
    matrix = to_matrix(weight).double()  # (out, in*kh*kw)
    # float64: in a float32 Gram matrix, rounding of the largest values hides the smallest
    u, s, vh = _smallest(matrix, rank) if shape[0] <= matrix.shape[1] else _flipped(_smallest(matrix.T, rank))
    sign = canonical_signs(u)
    root = s.sqrt()
    up, down = to_factors((u * (sign * root)).float(), (vh * (sign * root)[:, None]).float(), shape)
    return LowRank(down=down, up=up, alpha=float(rank))


def _smallest(wide: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return u (rows, rank), s (rank) descending and vh (rank, columns); needs rows <= columns."""
    u = eigenvectors(wide @ wide.T)[:, :rank]  # ascending
    projected = u.T @ wide  # (rank, columns), row i has norm s_i
    s, order = row_norms(projected).sort(descending=True, stable=True)
    return u[:, order], s, projected[order] / torch.where(s > 0, s, 1)[:, None]


def _flipped(triplet: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the triplets of the transposed matrix."""
    u, s, vh = triplet
    return vh.T, s, u.T


def plain_frame(shape: tuple[int, ...], *, rank: int, generator: torch.Generator) -> LowRank:
    """Return the initial factors of ordinary LoRA: A0 uniform in +-1/sqrt(in*kh*kw), B0 = 0, float32.

    The bounds are those of kaiming_uniform with a = sqrt(5), as in PEFT, sd-scripts and LyCORIS.
    """
    true_rank = min(rank, full_rank(shape))
    columns = math.prod(shape[1:])
    uniform = torch.rand(true_rank, columns, generator=generator)
    up, down = to_factors(torch.zeros(shape[0], true_rank), (2 * uniform - 1) / math.sqrt(columns), shape)
    return LowRank(down=down, up=up, alpha=float(true_rank))


def svd_down_frame(weight: Tensor, *, rank: int, name: str = "weight") -> LowRank:
    """Return A0 = V_r^T / sqrt(3) of the largest singular values and B0 = 0, float32.

    The rows of A0 have the length of those of `plain_frame`. Raises InputError like `split_weight`.
    """
    principal = principal_frame(weight, rank=rank, name=name)
    without_up = LowRank(principal.down, torch.zeros_like(principal.up), principal.alpha)
    return normalized(without_up, UNIT_LENGTH)


def rank_stabilized(frame: LowRank) -> LowRank:
    """Return a frame with B0 = 0 at the scale sqrt(16 / rank) instead of 1, by its alpha.

    From rsLoRA (Kalajdzievski 2023, arXiv 2312.03732), where the scale is alpha / sqrt(rank).
    """
    assert not frame.up.any(), "another scale would change the product of this frame"
    return LowRank(frame.down, frame.up, math.sqrt(REFERENCE_RANK * frame.rank))


def aligned_frame(u: Tensor, vh: Tensor, shape: tuple[int, ...], *, rank: int, length: float) -> LowRank:
    """Return unit directions times `length`: B0 from columns 1..r of u, A0 from rows r+1..2r of vh, float32.

    With this frame, the first step of plain gradient descent is the best approximation of rank 2r to a step
    along u diag(s) vh (LoRA-GA: Wang, Yu, Li 2024, arXiv 2407.05000). If u and vh have fewer than 2r
    directions, A0 is made from rows 1..r.
    """
    true_rank = min(rank, full_rank(shape))
    second = true_rank if 2 * true_rank <= full_rank(shape) else 0
    up, down = to_factors(u[:, :true_rank] * length, vh[second : second + true_rank] * length, shape)
    return LowRank(down=down.float(), up=up.float(), alpha=float(true_rank))


def normalized(frame: LowRank, length: float) -> LowRank:
    """Scale every nonzero row of A0 and every nonzero column of B0 to the Euclidean length `length`."""
    up, down = to_matrix(frame.up), to_matrix(frame.down)
    up, down = _at_length(up.T, length).T, _at_length(down, length)
    return LowRank(
        down=down.reshape(frame.down.shape), up=up.reshape(frame.up.shape).contiguous(), alpha=frame.alpha
    )


def _at_length(rows: Tensor, length: float) -> Tensor:
    wide = rows.double()
    norms = row_norms(wide)
    return (wide * (length / torch.where(norms > 0, norms, 1))[:, None]).to(rows.dtype)
