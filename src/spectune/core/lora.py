"""Express the change of a layer as LoRA factors that any program can add to the original weight."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectune.core.delta import Delta, added_to_base, added_to_residual, change
from spectune.core.linalg import norm, relative_error, thin_qr, thin_svd
from spectune.core.low_rank import LowRank, product, to_factors, to_matrix, weight_shape
from spectune.core.rounding import check_finite, rounded
from spectune.core.svd import canonical_signs
from spectune.errors import InputError

DIVERGED = "the training may have diverged: export an earlier step"


@dataclass(frozen=True)
class ExportedLayer:
    """The export of one layer; errors are Frobenius norms relative to the norm of the change."""

    name: str
    rank: int
    full_rank: int  # the rank that keeps the complete change
    norm: float  # of the exact change
    error: float  # of the stored product, by truncation and rounding together

    @property
    def truncated(self) -> bool:
        return self.rank < self.full_rank

    @property
    def part(self) -> str:
        """Return unet, te1 or te2."""
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Exported:
    """The stored factors of one layer, and their report."""

    low_rank: LowRank
    report: ExportedLayer


def exported_rank(layer: LowRank | Delta, rank: int | None) -> int:
    """Return the rank of an exported layer: the rank of its change (2r for a delta), at most `rank`."""
    pair = layer.frame if isinstance(layer, Delta) else layer
    terms = 2 * pair.rank if isinstance(layer, Delta) else pair.rank
    return limited_rank(weight_shape(pair), terms, rank)


def limited_rank(shape: tuple[int, ...], terms: int, rank: int | None) -> int:
    """Return the rank of a sum of `terms` rank-1 products in a weight of this shape, at most `rank`."""
    full = min(terms, shape[0], math.prod(shape[1:]))
    if rank is not None and rank < 1:
        raise InputError(f"`rank` is {rank}: expected at least 1")
    return full if rank is None else min(rank, full)


def change_factors(layer: LowRank | Delta, name: str) -> LowRank:
    """Return the change of a layer as one pair in float32; raise InputError if a factor is not finite."""
    if isinstance(layer, Delta):
        check_factors(layer.frame, name)
    check_factors(layer, name)
    pair = added_to_base(layer)
    return LowRank(down=pair.down.float(), up=pair.up.float(), alpha=pair.alpha)


def check_factors(layer: LowRank | Delta, name: str) -> None:
    """Raise InputError if a factor of a layer contains NaN or infinity."""
    for tensor in (layer.down, layer.up):
        check_finite(tensor, f"the change of {name}", hint=DIVERGED)


@dataclass(frozen=True)
class _Spectrum:
    """The change of a layer as left up_core diag(values) down_core right^T, without the full matrix."""

    left: Tensor  # (out, k), orthonormal columns
    up_core: Tensor  # (k, m)
    values: Tensor  # (m) descending
    down_core: Tensor  # (m, l)
    right: Tensor  # (in*kh*kw, l), orthonormal columns


def _spectrum(pair: LowRank) -> _Spectrum:
    # float64: costs little here, and the norm of the change may be 1e-3 of the product of the factors' norms
    left, left_core = thin_qr(to_matrix(pair.up).double())  # (out, k), (k, 2r)
    right, right_core = thin_qr(to_matrix(pair.down).double().T)  # (in*kh*kw, l), (l, 2r)
    up_core, values, down_core = thin_svd(left_core @ right_core.T * pair.scale)
    return _Spectrum(left, up_core, values, down_core, right)


def change_singular_values(layer: LowRank | Delta, name: str) -> Tensor:
    """Return the singular values of the change of a layer, float64, descending."""
    return _spectrum(change_factors(layer, name)).values


def export_layer(
    layer: LowRank | Delta,
    *,
    rank: int | None = None,
    store: torch.dtype = torch.float16,
    name: str = "layer",
) -> Exported:
    """Return the best factors of full rank, or of `rank`, for the change of a layer.

    The factors of [dB, B0] [A0+dA; dA] are far larger than their product, so 16 bits would lose the change.
    Two QRs and an SVD of the (2r x 2r) core give balanced factors, which are then rounded to `store`.
    """
    pair = change_factors(layer, name)
    shape = weight_shape(pair)
    kept = exported_rank(layer, rank)
    spectrum = _spectrum(pair)
    root = spectrum.values[:kept].sqrt()
    up = spectrum.left @ (spectrum.up_core[:, :kept] * root)  # (out, kept)
    down = (root[:, None] * spectrum.down_core[:kept]) @ spectrum.right.T  # (kept, in*kh*kw)
    sign = canonical_signs(up)
    up, down = up * sign, down * sign[:, None]
    stored_up, stored_down = to_factors(up.float(), down.float(), shape)
    low_rank = LowRank(
        down=rounded(stored_down, store, name), up=rounded(stored_up, store, name), alpha=float(kept)
    )
    size = float(spectrum.values.square().sum().sqrt())
    cut = float(spectrum.values[kept:].square().sum())
    lost = math.sqrt(cut + _rounding_square(up, down, low_rank))
    report = ExportedLayer(name, kept, exported_rank(layer, None), size, lost / size if size else 0.0)
    return Exported(low_rank, report)


def _rounding_square(up: Tensor, down: Tensor, stored: LowRank) -> float:
    """Return |stored product - up @ down|^2, computed with matrices of twice the rank.

    The difference is [eB, B] [A'; eA], with rounding errors eB and eA and the stored A'. Its squared norm is
    the trace of a product of two Gram matrices, so no matrix of the weight's shape is needed. The truncated
    part is orthogonal to it, except for a product of two rounding errors.
    """
    up_error = to_matrix(stored.up).double() - up
    stored_down = to_matrix(stored.down).double()
    left = torch.cat([up_error, up], dim=1)  # (out, 2 kept)
    right = torch.cat([stored_down, stored_down - down])  # (2 kept, in*kh*kw)
    return max(float(((left.T @ left) * (right @ right.T)).sum()), 0.0)


def tuned_principal(delta: Delta, *, store: torch.dtype = torch.float16, name: str = "layer") -> Exported:
    """Return the tuned factors B0+dB and A0+dA, which replace the principal of a residual.

    The complete factors are rounded, not only the change, so the relative error of the change is large.
    """
    change_factors(delta, name)
    factors = added_to_residual(delta)
    low_rank = LowRank(
        down=rounded(factors.down, store, name), up=rounded(factors.up, store, name), alpha=factors.alpha
    )
    exact = change(delta)
    error = relative_error(product(low_rank) - product(delta.frame), exact)
    return Exported(low_rank, ExportedLayer(name, low_rank.rank, low_rank.rank, norm(exact), error))


def with_unit_scale(low_rank: LowRank, store: torch.dtype, name: str) -> Exported:
    """Return the same product with alpha = rank, which is scale 1 in every program; scales `up` instead.

    A scale that is a power of two only rounds values that become too small for the dtype.
    """
    check_factors(low_rank, name)
    up = rounded(low_rank.up.float() * low_rank.scale, store, name)
    result = LowRank(down=rounded(low_rank.down.float(), store, name), up=up, alpha=float(low_rank.rank))
    return Exported(result, compare_products(low_rank, result, name))


def compare_products(before: LowRank, after: LowRank, name: str) -> ExportedLayer:
    """Return the report of replacing factors by others of the same rank: the error of the product."""
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
    """Return the relative error of the change over all layers."""
    layers = list(layers)
    total = sum(layer.norm**2 for layer in layers)
    return math.sqrt(sum((layer.error * layer.norm) ** 2 for layer in layers) / total) if total else 0.0


def weighted(low_rank: LowRank, weight: float) -> LowRank:
    """Return the product times `weight`: multiplies alpha and keeps the factors."""
    return replace(low_rank, alpha=low_rank.alpha * weight)
