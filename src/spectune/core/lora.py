"""The change that an adapter makes to a layer, as factors that any program can add to the original weight."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectune.core.delta import Delta, added_to_base, added_to_residual, change
from spectune.core.linalg import norm, thin_qr, thin_svd
from spectune.core.low_rank import LowRank, product, to_factors, to_matrix, weight_shape
from spectune.core.report import relative_error
from spectune.core.rounding import check_finite, rounded
from spectune.core.svd import settled_signs
from spectune.errors import InputError

DIVERGED = "if the training diverged, export an earlier step"


@dataclass(frozen=True)
class ExportedLayer:
    """What became of one layer's change: relative errors are Frobenius norms over the norm of the change."""

    name: str
    rank: int
    full_rank: int  # the rank at which nothing is cut off
    norm: float  # of the exact change
    error: float  # of the stored factors' product, cutting and rounding together

    @property
    def truncated(self) -> bool:
        return self.rank < self.full_rank

    @property
    def part(self) -> str:
        """unet, te1 or te2."""
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Exported:
    low_rank: LowRank
    report: ExportedLayer


def exported_rank(layer: LowRank | Delta, rank: int | None) -> int:
    """The rank of a layer in the export: that of its change (twice its frame's), limited by it and `rank`."""
    pair = layer.frame if isinstance(layer, Delta) else layer
    terms = 2 * pair.rank if isinstance(layer, Delta) else pair.rank
    return limited_rank(weight_shape(pair), terms, rank)


def limited_rank(shape: tuple[int, ...], terms: int, rank: int | None) -> int:
    """The rank of a sum of `terms` products in a weight of this shape, cut to `rank`."""
    full = min(terms, shape[0], math.prod(shape[1:]))
    if rank is not None and rank < 1:
        raise InputError(f"the export rank is {rank}: expected at least 1")
    return full if rank is None else min(rank, full)


def change_factors(layer: LowRank | Delta, name: str) -> LowRank:
    """The change of a layer as one pair in float32; raises InputError where it is not finite."""
    if isinstance(layer, Delta):
        check_factors(layer.frame, name)
    check_factors(layer, name)
    pair = added_to_base(layer)
    return LowRank(down=pair.down.float(), up=pair.up.float(), alpha=pair.alpha)


def check_factors(layer: LowRank | Delta, name: str) -> None:
    """Raise InputError when a factor of a layer holds NaN or infinity."""
    for tensor in (layer.down, layer.up):
        check_finite(tensor, f"the change of {name}", hint=DIVERGED)


@dataclass(frozen=True)
class _Spectrum:
    """left up_core diag(values) down_core right^T is the change of a layer, without forming it."""

    left: Tensor  # (out, k), orthonormal columns
    up_core: Tensor  # (k, m)
    values: Tensor  # (m) descending
    down_core: Tensor  # (m, l)
    right: Tensor  # (in*kh*kw, l), orthonormal columns


def _spectrum(pair: LowRank) -> _Spectrum:
    # float64: small here, and the change may be 1e-3 of the factors whose product it is
    left, left_core = thin_qr(to_matrix(pair.up).double())  # (out, k), (k, 2r)
    right, right_core = thin_qr(to_matrix(pair.down).double().T)  # (in*kh*kw, l), (l, 2r)
    up_core, values, down_core = thin_svd(left_core @ right_core.T * pair.scale)
    return _Spectrum(left, up_core, values, down_core, right)


def change_values(layer: LowRank | Delta, name: str) -> Tensor:
    """The singular values of the change of a layer, float64 descending."""
    pair = change_factors(layer, name)
    _, left_core = thin_qr(to_matrix(pair.up).double())
    _, right_core = thin_qr(to_matrix(pair.down).double().T)
    _, values, _ = thin_svd(left_core @ right_core.T * pair.scale)
    return values


def export_layer(
    layer: LowRank | Delta,
    *,
    rank: int | None = None,
    store: torch.dtype = torch.float16,
    name: str = "layer",
) -> Exported:
    """The best factors of the full rank, or of the given `rank`, for the change of a layer.

    [dB, B0] [A0+dA; dA] has factors far larger than its product, which 16 bits would lose; so it is
    re-factored by two QRs and the SVD of the (2r x 2r) core, balanced, and only then rounded to `store`.
    """
    pair = change_factors(layer, name)
    shape = weight_shape(pair)
    kept = exported_rank(layer, rank)
    found = _spectrum(pair)
    root = found.values[:kept].sqrt()
    up = found.left @ (found.up_core[:, :kept] * root)  # (out, kept)
    down = (root[:, None] * found.down_core[:kept]) @ found.right.T  # (kept, in*kh*kw)
    sign = settled_signs(up)
    up, down = up * sign, down * sign[:, None]
    stored_up, stored_down = to_factors(up.float(), down.float(), shape)
    low_rank = LowRank(
        down=rounded(stored_down, store, name), up=rounded(stored_up, store, name), alpha=float(kept)
    )
    size = float(found.values.square().sum().sqrt())
    cut = float(found.values[kept:].square().sum())
    lost = math.sqrt(cut + _rounding_square(up, down, low_rank))
    report = ExportedLayer(name, kept, exported_rank(layer, None), size, lost / size if size else 0.0)
    return Exported(low_rank, report)


def _rounding_square(up: Tensor, down: Tensor, stored: LowRank) -> float:
    """The square of the norm of stored product - up @ down, from matrices of twice the rank.

    The difference is [eB, B] [A'; eA] with the rounding errors eB, eA and the stored A'; the square of its
    norm is the trace of the product of two Gram matrices, so the weight's own shape is never formed. What is
    cut off is orthogonal to it but for a product of two rounding errors.
    """
    up_error = to_matrix(stored.up).double() - up
    stored_down = to_matrix(stored.down).double()
    left = torch.cat([up_error, up], dim=1)  # (out, 2 kept)
    right = torch.cat([stored_down, stored_down - down])  # (2 kept, in*kh*kw)
    return max(float(((left.T @ left) * (right @ right.T)).sum()), 0.0)


def tuned_principal(delta: Delta, *, store: torch.dtype = torch.float16, name: str = "layer") -> Exported:
    """The tuned factors B0+dB and A0+dA themselves: what takes the principal's place beside the residual.

    The rounding falls on the whole factors and not on the change alone, so the error of the change is large.
    """
    change_factors(delta, name)
    factors = added_to_residual(delta)
    low_rank = LowRank(
        down=rounded(factors.down, store, name), up=rounded(factors.up, store, name), alpha=factors.alpha
    )
    exact = change(delta)
    error = relative_error(product(low_rank) - product(delta.frame), exact)
    return Exported(low_rank, ExportedLayer(name, low_rank.rank, low_rank.rank, norm(exact), error))


def evened(low_rank: LowRank, store: torch.dtype, name: str) -> Exported:
    """The same product with alpha = rank, so that its scale is 1 in every program: the scale goes into `up`.

    Where the scale is a power of two nothing is rounded but numbers that are too small for the type then.
    """
    check_factors(low_rank, name)
    up = rounded(low_rank.up.float() * low_rank.scale, store, name)
    result = LowRank(down=rounded(low_rank.down.float(), store, name), up=up, alpha=float(low_rank.rank))
    return Exported(result, same_product(low_rank, result, name))


def same_product(before: LowRank, after: LowRank, name: str) -> ExportedLayer:
    """How far the product of stored factors is from that of the factors, as many, they were made of."""
    assert after.rank == before.rank, f"rank of {name}"
    size = _norm(before)
    up = to_matrix(before.up).double() * before.scale
    stored = LowRank(after.down, to_matrix(after.up).double() * after.scale, float(after.rank))
    square = _rounding_square(up, to_matrix(before.down).double(), stored)
    return ExportedLayer(name, after.rank, before.rank, size, math.sqrt(square) / size if size else 0.0)


def _norm(low_rank: LowRank) -> float:
    up, down = to_matrix(low_rank.up).double(), to_matrix(low_rank.down).double()
    return math.sqrt(max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0)) * abs(low_rank.scale)


def total_error(layers: Iterable[ExportedLayer]) -> float:
    """Relative error of the change of all layers together."""
    layers = list(layers)
    total = sum(layer.norm**2 for layer in layers)
    return math.sqrt(sum((layer.error * layer.norm) ** 2 for layer in layers) / total) if total else 0.0


def weighted(low_rank: LowRank, weight: float) -> LowRank:
    """`weight` times the same product; factors are not touched."""
    return replace(low_rank, alpha=low_rank.alpha * weight)
