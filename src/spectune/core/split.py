"""Compute the principal factors of one weight (PiSSA: Meng, Wang, Zhang 2024, arXiv 2404.02948)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.core.linalg import norm
from spectune.core.low_rank import LowRank, to_factors, to_matrix
from spectune.core.rank import full_rank
from spectune.core.rounding import check_dtype, check_finite, rounded
from spectune.core.spectrum import DAMAGED
from spectune.core.svd import Method, top_singular


@dataclass(frozen=True)
class LayerReport:
    """A report on a factored layer."""

    name: str
    shape: tuple[int, ...]
    rank: int
    energy: float  # share of the squared norm in the stored directions, 0..1
    norm: float  # Frobenius norm of the weight
    largest: float  # largest singular value
    smallest_kept: float  # singular value number `rank`
    method: str = "exact"  # of the SVD
    excess: float = 0.0  # estimate of (residual norm / smallest possible norm) - 1

    @property
    def capped(self) -> bool:
        """Whether the rank is the full rank of the layer."""
        return self.rank == full_rank(self.shape)


@dataclass(frozen=True)
class Split:
    """The stored principal factors of one layer, and their report."""

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
    """Return B0 = U sqrt(S) and A0 = sqrt(S) V^T of the `rank` largest singular values, rounded to `store`.

    weight is (out, in) or (out, in, kh, kw). The rank is at most min(out, in*kh*kw), and alpha equals it.
    Computes on `device` and returns tensors on the CPU. Raises InputError for a dtype that weights cannot
    have, for NaN and infinity, and if `store` cannot hold a factor.
    """
    check_dtype(weight.dtype, name)
    shape = tuple(weight.shape)
    true_rank = min(rank, full_rank(shape))
    matrix = to_matrix(weight).to(device).float()  # (out, in*kh*kw)
    size = norm(matrix)
    if not math.isfinite(size):  # only then is a second pass over the values needed
        check_finite(weight, name, hint=DAMAGED)
    triplet = top_singular(matrix, true_rank, method, size=size)
    # sqrt on both sides: balanced factors have balanced gradients and stay within the range of fp16
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


def total_energy(layers: Iterable[LayerReport]) -> float:
    """Return the share of the squared norm of all layers that is in the stored directions."""
    layers = list(layers)
    total = sum(layer.norm**2 for layer in layers)
    return sum(layer.energy * layer.norm**2 for layer in layers) / total if total else 1.0
