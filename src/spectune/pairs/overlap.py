"""Compare an adapter with the weights of a model, to recognize a principal without metadata."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

from torch import Tensor

from spectune.adapters.adapter import Adapter, TunedAdapter
from spectune.core.delta import Delta
from spectune.core.linalg import norm
from spectune.core.low_rank import LowRank, to_matrix, weight_shape
from spectune.files.source import WeightSource
from spectune.sdxl.layers import Layer, build_catalogue, layer_weight

SAMPLE = 12  # number of layers to compare
# Threshold of |BA| / |W|. The largest 16 directions of a trained layer hold at least a third of its energy,
# the change of a LoRA a few percent.
LARGE = 0.2


class Place(StrEnum):
    """How the product of an adapter relates to the weights of a model."""

    INSIDE = "if the base contains its values"  # adding it would count it twice
    MISSING = "if the base lacks its values"  # as a residual lacks its principal
    UNRELATED = "otherwise"


@dataclass(frozen=True)
class Overlap:
    """Medians over a sample of layers; W is the weight, BA the product of the adapter's factors."""

    size: float  # |BA| / |W|
    projection: float  # <W, BA> / |BA|^2: 1 if BA is the principal of W, 0 if W is the residual without BA

    @property
    def place(self) -> Place:
        if self.size > LARGE and 0.5 < self.projection < 1.5:
            return Place.INSIDE
        if self.size > LARGE and abs(self.projection) <= 0.5:
            return Place.MISSING
        return Place.UNRELATED


def overlap(base: WeightSource, adapter: Adapter | TunedAdapter) -> Overlap:
    """Compare up to 12 layers of an adapter with the weights of a model; of deltas, compare the frame."""
    catalogue = build_catalogue(base, all_layers=True)
    names = [name for name in adapter.layers if name in catalogue.by_name]
    pairs = [_in_layer(base, catalogue.by_name[name], adapter.layers[name]) for name in _spread(names)]
    return _medians([pair for pair in pairs if pair is not None])


def overlap_of_adapters(one: Adapter, other: Adapter) -> Overlap:
    """Compare the products of two adapters: `one` takes the place of W, `other` that of BA."""
    names = [name for name in other.layers if name in one.layers]
    pairs = [_of_products(one.layers[name], other.layers[name]) for name in _spread(names)]
    return _medians([pair for pair in pairs if pair is not None])


def _in_layer(base: WeightSource, layer: Layer, adapted: LowRank | Delta) -> tuple[float, float] | None:
    low_rank = adapted.frame if isinstance(adapted, Delta) else adapted
    if weight_shape(low_rank) != layer.shape:
        return None
    weight = to_matrix(layer_weight(base, layer)).float()  # (out, in*kh*kw)
    up, down = _factors(low_rank)
    inner = _inner(up.T @ weight, down)  # tr(W^T B A)
    return _ratios(inner, _square(up, down), norm(weight))


def _of_products(one: LowRank, other: LowRank) -> tuple[float, float] | None:
    up, down = _factors(one)
    other_up, other_down = _factors(other)
    inner = _inner(up.T @ other_up, down @ other_down.T)
    return _ratios(inner, _square(other_up, other_down), math.sqrt(max(_square(up, down), 0.0)))


def _factors(low_rank: LowRank) -> tuple[Tensor, Tensor]:
    """Return scale * B (out, rank) and A (rank, in*kh*kw) in float32."""
    return to_matrix(low_rank.up).float() * low_rank.scale, to_matrix(low_rank.down).float()


def _square(up: Tensor, down: Tensor) -> float:
    """Return |BA|^2."""
    return _inner(up.T @ up, down @ down.T)


def _inner(one: Tensor, other: Tensor) -> float:
    return float((one.double() * other.double()).sum())


def _ratios(inner: float, square: float, size: float) -> tuple[float, float] | None:
    """Return |BA| / |W| and <W, BA> / |BA|^2; None if either matrix is zero or not finite."""
    if not (square > 0 and size > 0 and math.isfinite(square) and math.isfinite(inner)):
        return None
    return math.sqrt(square) / size, inner / square


def _medians(pairs: Sequence[tuple[float, float]]) -> Overlap:
    if not pairs:
        return Overlap(0.0, 0.0)
    sizes, projections = zip(*pairs, strict=True)
    return Overlap(median(sizes), median(projections))


def _spread(names: Sequence[str]) -> list[str]:
    step = max(math.ceil(len(names) / SAMPLE), 1)
    return list(names[step // 2 :: step])
