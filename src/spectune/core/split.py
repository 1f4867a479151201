"""One weight = principal factors + residual (PiSSA: Meng, Wang, Zhang 2024, arXiv 2404.02948)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.core.linalg import norm
from spectune.core.low_rank import LowRank, to_factors, to_matrix
from spectune.core.rank import full_rank
from spectune.core.report import LayerReport
from spectune.core.rounding import check_dtype, check_finite, rounded
from spectune.core.spectrum import DAMAGED
from spectune.core.svd import Method, top_singular


@dataclass(frozen=True)
class Split:
    """The principal factors of one layer, as they are stored, and what was measured on the way."""

    low_rank: LowRank
    report: LayerReport


def split_weight(
    weight: Tensor,
    *,
    rank: int,
    store: torch.dtype = torch.float16,
    method: Method = "auto",
    device: torch.device | str = "cpu",
    name: str = "weight",
) -> Split:
    """B0 = U sqrt(S) and A0 = sqrt(S) V^T of the `rank` largest singular values, rounded to `store`.

    weight is (out, in) or (out, in, kh, kw). alpha is the true rank, which min(out, in*kh*kw) caps.
    The factors are computed on `device` and returned on the CPU. Raises InputError for types that are no
    weights, for NaN or infinite numbers, and when `store` cannot hold a factor.
    """
    check_dtype(weight.dtype, name)
    shape = tuple(weight.shape)
    true_rank = min(rank, full_rank(shape))
    matrix = to_matrix(weight).to(device).float()  # (out, in*kh*kw)
    size = norm(matrix)
    if not math.isfinite(size):  # one pass in float32 instead of a second one through the stored type
        check_finite(weight, name, hint=DAMAGED)
    triplet = top_singular(matrix, true_rank, method, size=size)
    # sqrt on both sides: balanced factors have balanced gradients, and both stay inside fp16's range
    root = triplet.s.sqrt()
    up, down = to_factors((triplet.u * root).cpu(), (triplet.vh * root[:, None]).cpu(), shape)
    low_rank = LowRank(down=rounded(down, store, name), up=rounded(up, store, name), alpha=float(true_rank))
    kept = float(triplet.s.cpu().double().square().sum())
    report = LayerReport(
        name=name,
        shape=shape,
        rank=true_rank,
        energy=kept / size**2 if size else 1.0,
        norm=size,
        largest=float(triplet.s[0]),
        smallest_kept=float(triplet.s[-1]),
        method=triplet.method,
        excess=triplet.excess,
    )
    return Split(low_rank=low_rank, report=report)
