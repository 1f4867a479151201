"""One weight = principal factors + residual (PiSSA: Meng, Wang, Zhang 2024, arXiv 2404.02948)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.factor.linalg import norm
from spectune.factor.matrix import product, to_factors, to_matrix
from spectune.factor.rank import full_rank
from spectune.factor.report import LayerReport
from spectune.factor.rounding import check_dtype, check_finite, rounded
from spectune.factor.svd import Method, top_singular
from spectune.weights.adapter import LowRank

# Between 0 and half of fp16's smallest number, so that it rounds to -0; as far from either end as float32
# can tell beside a principal of up to 0.5.
_UNDERFLOW = -1.5 * 2.0**-26

_DAMAGED = "the checkpoint is damaged or overflowed when it was saved; get it again or use its fp32 form"


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
    name: str = "weight",
) -> Split:
    """B0 = U sqrt(S) and A0 = sqrt(S) V^T of the `rank` largest singular values, rounded to `store`.

    weight is (out, in) or (out, in, kh, kw). alpha is the true rank, which min(out, in*kh*kw) caps.
    Raises InputError for types other than fp16, bf16 and fp32, for NaN or infinite weights, and when `store`
    cannot hold a factor.
    """
    check_dtype(weight.dtype, name)
    check_finite(weight, name, hint=_DAMAGED)
    shape = tuple(weight.shape)
    true_rank = min(rank, full_rank(shape))
    matrix = to_matrix(weight).float()  # (out, in*kh*kw)
    triplet = top_singular(matrix, true_rank, method)
    # sqrt on both sides: balanced factors have balanced gradients, and both stay inside fp16's range
    root = triplet.s.sqrt()
    up, down = to_factors(triplet.u * root, triplet.vh * root[:, None], shape)
    low_rank = LowRank(down=rounded(down, store, name), up=rounded(up, store, name), alpha=float(true_rank))
    size = norm(matrix)
    kept = float(triplet.s.double().square().sum())
    report = LayerReport(
        name=name,
        shape=shape,
        rank=true_rank,
        wanted_rank=rank,
        energy=kept / size**2 if size else 1.0,
        norm=size,
        largest=float(triplet.s[0]),
        smallest_kept=float(triplet.s[-1]),
    )
    return Split(low_rank=low_rank, report=report)


def residual(weight: Tensor, low_rank: LowRank, dtype: torch.dtype, *, name: str = "weight") -> Tensor:
    """R = W - scale*B0 A0 from the factors as stored, in float32, rounded once to `dtype`.

    float32 brings an fp16 weight back bit for bit where the principal is below 0.5 in magnitude, and mostly
    where it is not: `spectune split` counts the exceptions. A 16-bit residual costs one rounding. Raises
    InputError when `dtype` cannot hold a residual.
    """
    original = weight.float()
    if weight.dtype == torch.float16 and dtype == torch.float32:
        # An fp16 zero has a sign, a float32 sum of zero has none: what stands in rounds back to -0.
        negative_zero = (weight == 0) & weight.signbit()
        original = torch.where(negative_zero, _UNDERFLOW, original)
    principal = product(low_rank)
    return rounded(subtract(original, principal), dtype, f"the residual of {name}")


def subtract(weight: Tensor, amount: Tensor) -> Tensor:
    """weight - amount in float32; where the amount is zero every bit of the weight stays (0 - 0 keeps -0)."""
    return torch.where(amount == 0, weight, weight - amount)
