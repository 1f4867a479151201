"""A tuned layer as plain LoRA factors that any program can add to the original weight."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.errors import InputError
from spectune.factor.linalg import norm, thin_qr, thin_svd
from spectune.factor.matrix import absolute, change, joined, product, to_factors, to_matrix, weight_shape
from spectune.factor.report import relative_error
from spectune.factor.rounding import check_finite, rounded
from spectune.factor.svd import settled_signs
from spectune.weights.adapter import Delta, LowRank


@dataclass(frozen=True)
class ExportedLayer:
    """What became of one layer's change: relative errors are Frobenius norms over the norm of the change."""

    name: str
    rank: int
    full_rank: int  # the rank at which nothing is cut off: 2 * frame rank, limited by the layer
    norm: float  # of the exact change
    error: float  # of the stored factors' product, cutting and rounding together

    @property
    def truncated(self) -> bool:
        return self.rank < self.full_rank


@dataclass(frozen=True)
class Exported:
    low_rank: LowRank
    report: ExportedLayer


def exported_rank(delta: Delta, rank: int | None) -> int:
    """The rank of a layer in the export: twice its frame's, limited by the layer and by `rank`."""
    out, *columns = weight_shape(delta.frame)
    full = min(2 * delta.frame.rank, out, math.prod(columns))
    if rank is not None and rank < 1:
        raise InputError(f"the export rank is {rank}: expected at least 1")
    return full if rank is None else min(rank, full)


def export_layer(
    delta: Delta, *, rank: int | None = None, store: torch.dtype = torch.float16, name: str = "layer"
) -> Exported:
    """The best factors of rank 2r, or of the given `rank`, for the change of a tuned layer.

    [dB, B0] [A0+dA; dA] has factors far larger than its product, which 16 bits would lose; so it is
    re-factored by two QRs and the SVD of the (2r x 2r) core, balanced, and only then rounded to `store`.
    """
    _check_finite(delta, name)
    shape = weight_shape(delta.frame)
    kept = exported_rank(delta, rank)
    pair = joined(delta)
    # float64: small here, and the change may be 1e-3 of the factors whose product it is
    left, left_core = thin_qr(to_matrix(pair.up).double())  # (out, k), (k, 2r)
    right, right_core = thin_qr(to_matrix(pair.down).double().T)  # (in*kh*kw, l), (l, 2r)
    core = left_core @ right_core.T * pair.scale  # (k, l)
    up_core, values, down_core = thin_svd(core)
    root = values[:kept].sqrt()
    up = left @ (up_core[:, :kept] * root)  # (out, kept)
    down = (root[:, None] * down_core[:kept]) @ right.T  # (kept, in*kh*kw)
    sign = settled_signs(up)
    up, down = to_factors((up * sign).float(), (down * sign[:, None]).float(), shape)
    low_rank = LowRank(down=rounded(down, store, name), up=rounded(up, store, name), alpha=float(kept))
    exact = change(delta)
    return Exported(low_rank, _report(name, delta, low_rank, product(low_rank), exact))


def tuned_principal(delta: Delta, *, store: torch.dtype = torch.float16, name: str = "layer") -> Exported:
    """The tuned factors B0+dB and A0+dA themselves: what takes the principal's place beside the residual.

    The rounding falls on the whole factors and not on the change alone, so the error of the change is large.
    """
    _check_finite(delta, name)
    factors = absolute(delta)
    low_rank = LowRank(
        down=rounded(factors.down, store, name), up=rounded(factors.up, store, name), alpha=factors.alpha
    )
    stored_change = product(low_rank) - product(delta.frame)
    return Exported(low_rank, _report(name, delta, low_rank, stored_change, change(delta)))


def total_error(layers: Iterable[ExportedLayer]) -> float:
    """Relative error of the change of all layers together."""
    layers = list(layers)
    total = sum(layer.norm**2 for layer in layers)
    return math.sqrt(sum((layer.error * layer.norm) ** 2 for layer in layers) / total) if total else 0.0


def _report(name: str, delta: Delta, low_rank: LowRank, stored: Tensor, exact: Tensor) -> ExportedLayer:
    return ExportedLayer(
        name=name,
        rank=low_rank.rank,
        full_rank=exported_rank(delta, None),
        norm=norm(exact),
        error=relative_error(stored, exact),
    )


def _check_finite(delta: Delta, name: str) -> None:
    for tensor in (delta.down, delta.up):
        check_finite(tensor, f"the change of {name}", hint="if the training diverged, export an earlier step")
