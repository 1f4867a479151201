"""The difference of a complete weight: LyCORIS algo=full, and extracted full matrices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spectune.adapters.kinds.change import ChangeKind, Shape, Shapes, Tensors, no_rank
from spectune.sdxl.layers import squeezed


@dataclass(frozen=True)
class FullDifference:
    """W + D."""

    difference: Tensor  # in the shape of W

    def change(self, weight: Tensor, strength: float) -> Tensor:
        return (self.difference.to(weight.dtype) * strength).reshape(weight.shape)


def _read(tensors: Tensors, alpha: float | None, weight: Shape) -> FullDifference:
    return FullDifference(tensors["diff"].reshape(weight))


def _fits(shapes: Shapes, weight: Shape) -> bool:
    return squeezed(shapes["diff"]) == squeezed(weight)


FULL_DIFFERENCE = ChangeKind("full matrix", (frozenset({"diff"}),), _fits, no_rank, _read)
