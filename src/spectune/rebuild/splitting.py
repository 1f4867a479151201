"""One tensor of a checkpoint, with one layer or three in it, split and checked at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.factor.matrix import product
from spectune.factor.rank import RankRule
from spectune.factor.report import Agreement, LayerReport, compare
from spectune.factor.split import residual, split_weight
from spectune.factor.svd import Method
from spectune.rebuild.merge import add
from spectune.weights.adapter import LowRank
from spectune.weights.catalogue import Layer


@dataclass(frozen=True)
class SplitPlan:
    """The rank of each layer and the types on disk; residual_dtype None keeps the tensor's own."""

    rule: RankRule
    store: torch.dtype
    residual_dtype: torch.dtype | None = None
    method: Method = "auto"


@dataclass(frozen=True)
class SplitTensor:
    """The parts of one tensor as they are stored, and how well they make it again."""

    residual: Tensor
    low_ranks: tuple[tuple[Layer, LowRank], ...]
    reports: tuple[LayerReport, ...]
    agreement: Agreement


def split_tensor(tensor: Tensor, layers: Sequence[Layer], plan: SplitPlan) -> SplitTensor:
    """Split every layer of a tensor by itself; the residual has the tensor's shape."""
    left = tensor.to(plan.residual_dtype or tensor.dtype, copy=True)
    rebuilt = tensor.to(torch.float32, copy=True)
    low_ranks: list[tuple[Layer, LowRank]] = []
    reports: list[LayerReport] = []
    for layer in layers:
        rows = layer.row_slice
        rank = plan.rule.wanted(layer.shape)
        split = split_weight(tensor[rows], rank=rank, store=plan.store, method=plan.method, name=layer.name)
        left[rows] = residual(tensor[rows], split.low_rank, left.dtype, name=layer.name)
        rebuilt[rows] = add(left[rows].float(), product(split.low_rank))
        low_ranks.append((layer, split.low_rank))
        reports.append(split.report)
    return SplitTensor(left, tuple(low_ranks), tuple(reports), compare(rebuilt.to(tensor.dtype), tensor))
