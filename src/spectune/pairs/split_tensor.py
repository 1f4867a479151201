"""Splitting one tensor of a checkpoint, which holds one layer or three, and checking the result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.core.agreement import Agreement, total_agreement
from spectune.core.low_rank import LowRank
from spectune.core.residual import Exceptions, subtract_principal
from spectune.core.split import LayerReport, split_weight
from spectune.core.svd import Method
from spectune.sdxl.layers import Layer

# Eight bits are too few for a residual.
_RESIDUAL_OF_NARROW = torch.float16


@dataclass(frozen=True)
class SplitPlan:
    """The rank of each factored layer, and the dtypes on disk."""

    ranks: Mapping[str, int]  # by layer name; other layers stay whole in the residual
    store: torch.dtype
    residual_dtype: torch.dtype | None = None  # None: the tensor's own, float16 for fp8
    method: Method = "auto"
    device: torch.device | str = "cpu"  # where the singular vectors are computed

    def residual_of(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the residual of a tensor of `dtype`."""
        own = _RESIDUAL_OF_NARROW if dtype.itemsize == 1 else dtype
        return self.residual_dtype or own


@dataclass(frozen=True)
class SplitTensor:
    """The parts of one tensor as they are stored, and their agreement with it."""

    residual: Tensor | None
    low_ranks: tuple[tuple[Layer, LowRank], ...]
    reports: tuple[LayerReport, ...]
    agreement: Agreement | None
    exceptions: tuple[tuple[int, Exceptions], ...] = ()  # with the position where the layer begins


def split_tensor(
    tensor: Tensor, layers: Sequence[Layer], plan: SplitPlan, *, with_residual: bool = True
) -> SplitTensor:
    """Split every layer of a tensor; the residual has the shape of the tensor."""
    pairs: list[tuple[Layer, LowRank]] = []
    reports: list[LayerReport] = []
    for layer in layers:
        split = split_weight(
            tensor[layer.row_slice],
            rank=plan.ranks[layer.name],
            store=plan.store,
            method=plan.method,
            device=plan.device,
            name=layer.name,
        )
        pairs.append((layer, split.low_rank))
        reports.append(split.report)
    if not with_residual:
        return SplitTensor(None, tuple(pairs), tuple(reports), None)
    dtype = plan.residual_of(tensor.dtype)
    # rows of a fused tensor that belong to no factored layer stay unchanged
    left = tensor.to(dtype, copy=True) if len(layers) > 1 or layers[0].rows is not None else None
    agreements: list[Agreement] = []
    exceptions: list[tuple[int, Exceptions]] = []
    for layer, low_rank in pairs:
        part = subtract_principal(tensor[layer.row_slice], low_rank, dtype, name=layer.name)
        agreements.append(part.agreement)
        if part.exceptions is not None:
            start = 0 if layer.rows is None else layer.rows[0]
            exceptions.append((start * math.prod(tensor.shape[1:]), part.exceptions))
        if left is None:
            left = part.residual
        else:
            left[layer.row_slice] = part.residual
    return SplitTensor(left, tuple(pairs), tuple(reports), total_agreement(agreements), tuple(exceptions))
