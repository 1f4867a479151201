"""Sum the layers of several adapters: overlapping layers are added, none is overwritten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from spectune.core.delta import Delta
from spectune.core.lora import (
    Exported,
    change_factors,
    check_factors,
    compare_products,
    export_layer,
    limited_rank,
    weighted,
)
from spectune.core.low_rank import LowRank, common_dtype, weight_shape
from spectune.core.rounding import rounded


@dataclass(frozen=True)
class Term:
    """A layer of one adapter and its factor in the sum."""

    layer: LowRank | Delta
    weight: float


def sum_terms(terms: Sequence[Term], store: torch.dtype, name: str, *, unit_scale: bool = False) -> Exported:
    """Return the weighted sum of changes of one layer as one pair, stored as `store`.

    A single layer at weight 1 keeps its factors and alpha. Otherwise, factors are concatenated, and `up` is
    multiplied by the weights and by scales that differ. A sum whose rank exceeds the layer's full rank is
    factored again, and so is a sum that contains the change of a tuned layer. With `unit_scale`, `up` is also
    multiplied by the scale, so that alpha = rank. The report has the rounding error.
    """
    low_ranks = [weighted(_plain(term.layer, name), term.weight) for term in terms]
    joint = low_ranks[0] if len(low_ranks) == 1 else concatenated(low_ranks)
    kept = limited_rank(weight_shape(joint), joint.rank, None)
    too_large = len(terms) > 1 and kept < joint.rank
    if too_large or any(isinstance(term.layer, Delta) for term in terms):
        return export_layer(joint, rank=kept, store=store, name=name)
    if len(terms) == 1:
        alpha, factor = _alpha(terms[0].layer), terms[0].weight
        up = joint.up if factor == 1 else joint.up.float() * factor
        joint = LowRank(down=joint.down, up=up, alpha=alpha)
    if unit_scale and joint.alpha != joint.rank:
        joint = replace(joint, up=joint.up.float() * joint.scale, alpha=float(joint.rank))
    result = LowRank(
        down=rounded(joint.down, store, name), up=rounded(joint.up, store, name), alpha=joint.alpha
    )
    exact = low_ranks[0] if len(low_ranks) == 1 else joint
    return Exported(result, compare_products(exact, result, name))


def concatenated(low_ranks: Sequence[LowRank]) -> LowRank:
    """Return the sum of products as one product, in float32 if scales differ, else in the stored dtype."""
    scales = {low_rank.scale for low_rank in low_ranks}
    rank = sum(low_rank.rank for low_rank in low_ranks)
    dtype = common_dtype([side.dtype for pair in low_ranks for side in (pair.down, pair.up)])
    down = torch.cat([low_rank.down.to(dtype) for low_rank in low_ranks])
    if len(scales) == 1:
        up = torch.cat([low_rank.up.to(dtype) for low_rank in low_ranks], dim=1)
        return LowRank(down=down, up=up, alpha=scales.pop() * rank)
    up = torch.cat([low_rank.up.float() * low_rank.scale for low_rank in low_ranks], dim=1)
    return LowRank(down=down, up=up, alpha=float(rank))


def _plain(layer: LowRank | Delta, name: str) -> LowRank:
    if isinstance(layer, Delta):
        return change_factors(layer, name)
    check_factors(layer, name)
    return layer


def _alpha(layer: LowRank | Delta) -> float:
    assert isinstance(layer, LowRank)
    return layer.alpha
