"""Split one tensor of a checkpoint, which holds one layer or three, and check the result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.core.agreement import Agreement, total_agreement
from spectune.core.linalg import new_copy
from spectune.core.low_rank import LowRank
from spectune.core.residual import Exceptions, subtract_principal
from spectune.core.split import LayerReport, split_weight
from spectune.core.svd import Method
from spectune.sdxl.layers import Layer

# 8 bits are too few for a residual.
_RESIDUAL_OF_FP8 = torch.float16


@dataclass(frozen=True)
class SplitPlan:
    """The rank of each factored layer, and the dtypes on disk."""

    ranks: Mapping[str, int]  # by layer name; the residual keeps the full weight of other layers
    store: torch.dtype
    residual_dtype: torch.dtype | None = None  # None: the dtype of the tensor, or float16 for fp8
    method: Method = "auto"
    device: torch.device | str = "cpu"  # where the singular vectors are computed

    def residual_of(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the residual of a tensor of `dtype`."""
        return self.residual_dtype or (_RESIDUAL_OF_FP8 if dtype.itemsize == 1 else dtype)


@dataclass(frozen=True)
class SplitTensor:
    """The stored parts of one tensor, and how well they restore it."""

    residual: Tensor | None
    low_ranks: tuple[tuple[Layer, LowRank], ...]
    reports: tuple[LayerReport, ...]
    agreement: Agreement | None
    exceptions: tuple[tuple[int, Exceptions], ...] = ()  # each with the position where its layer begins


def split_tensor(
    tensor: Tensor, layers: Sequence[Layer], plan: SplitPlan, *, with_residual: bool = True
) -> SplitTensor:
    """Split every layer of a tensor; tensor and residual have the same shape."""
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
    # a fused tensor also has rows outside of all factored layers; they stay unchanged
    residual = new_copy(tensor, dtype) if len(layers) > 1 or layers[0].rows is not None else None
    agreements: list[Agreement] = []
    exceptions: list[tuple[int, Exceptions]] = []
    for layer, low_rank in pairs:
        part = subtract_principal(tensor[layer.row_slice], low_rank, dtype, name=layer.name)
        agreements.append(part.agreement)
        if part.exceptions is not None:
            start = 0 if layer.rows is None else layer.rows[0]
            exceptions.append((start * math.prod(tensor.shape[1:]), part.exceptions))
        if residual is None:
            residual = part.residual
        else:
            residual[layer.row_slice] = part.residual
    return SplitTensor(residual, tuple(pairs), tuple(reports), total_agreement(agreements), tuple(exceptions))
