"""GLoRA: W A + B, both of low rank (Chavan et al. 2023, arXiv 2306.07967; LyCORIS)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spectune.adapters.kinds.change import ChangeKind, Shape, Shapes, Tensors, as_matrix, scale_of
from spectune.core.low_rank import LowRank, product

_A1, _A2, _B1, _B2 = "a1.weight", "a2.weight", "b1.weight", "b2.weight"


@dataclass(frozen=True)
class GLoRA:
    """W + scale * (W A1 A2 + B1 B2); A acts on the input channels."""

    inputs: tuple[Tensor, Tensor]  # A1 (in, rank) and A2 (rank, in), float64
    added: LowRank  # B1 B2
    scale: float

    def change(self, weight: Tensor, strength: float) -> Tensor:
        a1, a2 = self.inputs
        by_input = weight.flatten(2).transpose(1, -1) if weight.ndim > 2 else weight  # (out, kh*kw, in)
        result = by_input.double() @ a1 @ a2
        result = result.transpose(1, -1).reshape(weight.shape) if weight.ndim > 2 else result
        result += product(self.added).reshape(weight.shape)
        return result.mul_(self.scale * strength).float()


def _read(tensors: Tensors, alpha: float | None, weight: Shape) -> GLoRA:
    a1, a2, b1, b2 = (tensors[name].double().flatten(1) for name in (_A1, _A2, _B1, _B2))
    rank = len(a2)
    return GLoRA((a1, a2), LowRank(b2, b1, float(rank)), scale_of(alpha, rank))


def _fits(shapes: Shapes, weight: Shape) -> bool:
    rank = _rank(shapes)
    matrices = tuple(as_matrix(shapes[name]) for name in (_A1, _A2, _B1, _B2))
    inputs, columns = weight[1], as_matrix(weight)[1]
    return matrices == ((inputs, rank), (rank, inputs), (weight[0], rank), (rank, columns))


def _rank(shapes: Shapes) -> int:
    return as_matrix(shapes[_A2])[0]


GLORA = ChangeKind("GLoRA", (frozenset({_A1, _A2, _B1, _B2}),), _fits, _rank, _read)
