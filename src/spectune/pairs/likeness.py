"""Whether an adapter is the principal part of a model, told from the numbers where no metadata tells it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from spectune.adapters.adapter import Adapter, TunedAdapter
from spectune.core.delta import Delta, added_to_base
from spectune.core.linalg import norm
from spectune.core.low_rank import LowRank, to_matrix, weight_shape
from spectune.files.source import WeightSource
from spectune.sdxl.layers import Layer, build_catalogue, layer_weight

SAMPLE = 12  # layers that are looked at
# |BA| / |W|: the largest 16 directions of a trained layer hold a third of its energy or more; what a LoRA
# adds is a few percent of it.
LARGE = 0.2


@dataclass(frozen=True)
class Likeness:
    """Medians over a sample of layers of W, the weight, and BA, the product of the adapter's factors."""

    size: float  # |BA| / |W|
    projection: float  # <W, BA> / |BA|^2: 1 where BA is the principal of W, 0 where W is what it left

    @property
    def is_inside(self) -> bool:
        """The weights hold the product: added to them, it would count twice."""
        return self.size > LARGE and 0.5 < self.projection < 1.5

    @property
    def is_missing(self) -> bool:
        """The product is large and the weights lack it: a residual and its principal."""
        return self.size > LARGE and abs(self.projection) <= 0.5


def likeness(base: WeightSource, adapter: Adapter | TunedAdapter) -> Likeness:
    """Compare a few layers, spread over the adapter, with the weights of a model."""
    catalogue = build_catalogue(base, all_layers=True)
    names = [name for name in adapter.layers if name in catalogue.by_name]
    pairs = [_compared(base, catalogue.by_name[name], adapter.layers[name]) for name in _spread(names)]
    return _medians([pair for pair in pairs if pair is not None])


def likeness_of_adapters(one: Adapter, other: Adapter) -> Likeness:
    """The same of the products of two adapters: BA is that of `other`, W that of `one`."""
    names = [name for name in other.layers if name in one.layers]
    pairs = [_of_products(one.layers[name], other.layers[name]) for name in _spread(names)]
    return _medians([pair for pair in pairs if pair is not None])


def _of_products(one: LowRank, other: LowRank) -> tuple[float, float] | None:
    up, down = to_matrix(one.up).float() * one.scale, to_matrix(one.down).float()
    other_up, other_down = to_matrix(other.up).float() * other.scale, to_matrix(other.down).float()
    inner = _inner(up.T @ other_up, down @ other_down.T)
    square = _inner(other_up.T @ other_up, other_down @ other_down.T)
    size = math.sqrt(max(_inner(up.T @ up, down @ down.T), 0.0))
    return _pair(inner, square, size)


def _pair(inner: float, square: float, size: float) -> tuple[float, float] | None:
    """None where a side is empty or not finite: it says nothing."""
    if not (square > 0 and size > 0 and math.isfinite(square) and math.isfinite(inner)):
        return None
    return math.sqrt(square) / size, inner / square


def _medians(pairs: Sequence[tuple[float, float]]) -> Likeness:
    if not pairs:
        return Likeness(0.0, 0.0)
    sizes, projections = zip(*pairs, strict=True)
    return Likeness(median(sizes), median(projections))


def _spread(names: Sequence[str]) -> list[str]:
    step = max(math.ceil(len(names) / SAMPLE), 1)
    return list(names[step // 2 :: step])


def _compared(base: WeightSource, layer: Layer, adapted: LowRank | Delta) -> tuple[float, float] | None:
    """|BA| / |W| and <W, BA> / |BA|^2 of one layer; None where they say nothing."""
    low_rank = added_to_base(adapted)
    if weight_shape(low_rank) != layer.shape:
        return None
    weight = to_matrix(layer_weight(base, layer)).float()  # (out, in*kh*kw)
    up, down = to_matrix(low_rank.up).float() * low_rank.scale, to_matrix(low_rank.down).float()
    inner = _inner(up.T @ weight, down)  # tr(W^T B A)
    square = _inner(up.T @ up, down @ down.T)
    return _pair(inner, square, norm(weight))


def _inner(one: Tensor, other: Tensor) -> float:
    return float((one.double() * other.double()).sum())
