"""LoKr: the Kronecker product of two matrices, each complete or a product of factors (LyCORIS)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.adapters.kinds.change import ChangeKind, Shape, Shapes, Tensors, as_matrix, scale_of

_W1 = (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"}))
_W2 = (
    frozenset({"lokr_w2"}),
    frozenset({"lokr_w2_a", "lokr_w2_b"}),
    frozenset({"lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
)


@dataclass(frozen=True)
class LoKr:
    """W + scale * (C kron D)."""

    one: Tensor  # C (a, c), float64, with the scale
    other: Tensor  # D (b, d*kh*kw), float64; W is (a*b, c*d, kh, kw)

    def change(self, weight: Tensor, strength: float) -> Tensor:
        return torch.kron((self.one * strength).float(), self.other.float()).reshape(weight.shape)


def _read(tensors: Tensors, alpha: float | None, weight: Shape) -> LoKr:
    rank = _rank({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    # two complete matrices have scale 1, whatever their alpha
    scale = 1.0 if rank is None else scale_of(alpha, rank)
    full = {name: tensor.double().flatten(1) for name, tensor in tensors.items() if name != "lokr_t2"}
    one = full["lokr_w1"] if "lokr_w1" in full else full["lokr_w1_a"] @ full["lokr_w1_b"]
    if "lokr_w2" in full:
        other = full["lokr_w2"]
    elif "lokr_t2" in tensors:
        # LyCORIS's Tucker form: D[o,i,h,w] = sum_mn a[m,o] t[m,n,h,w] b[n,i]
        core = torch.einsum("mnhw,ni->mihw", tensors["lokr_t2"].double(), full["lokr_w2_b"])
        other = full["lokr_w2_a"].T @ core.flatten(1)
    else:
        other = full["lokr_w2_a"] @ full["lokr_w2_b"]
    return LoKr(one * scale, other)


def _fits(shapes: Shapes, weight: Shape) -> bool:
    one, other = _first_shape(shapes), _second_shape(shapes, weight)
    if one is None or other is None:
        return False
    out, columns = as_matrix(weight)
    return one[0] * other[0] == out and one[1] * other[1] == columns and other[1] % math.prod(weight[2:]) == 0


def _first_shape(shapes: Shapes) -> Shape | None:
    """Return the shape (a, c) of C; None if its factors do not fit together."""
    if "lokr_w1" in shapes:
        return as_matrix(shapes["lokr_w1"])
    return _joined(shapes["lokr_w1_a"], shapes["lokr_w1_b"])


def _second_shape(shapes: Shapes, weight: Shape) -> Shape | None:
    """Return the shape (b, d*kh*kw) of D; None if its factors do not fit together."""
    if "lokr_w2" in shapes:
        return as_matrix(shapes["lokr_w2"])
    a, b = shapes["lokr_w2_a"], shapes["lokr_w2_b"]
    if "lokr_t2" not in shapes:
        return _joined(a, b)
    (rank, out), (other, inputs) = as_matrix(a), as_matrix(b)
    if rank != other or shapes["lokr_t2"] != (rank, rank, *weight[2:]):
        return None
    return out, inputs * math.prod(weight[2:])


def _joined(a: Shape, b: Shape) -> Shape | None:
    (out, rank), (other, inputs) = as_matrix(a), as_matrix(b)
    return (out, inputs) if rank == other else None


def _rank(shapes: Shapes) -> int | None:
    factor = shapes.get("lokr_w2_b", shapes.get("lokr_w1_b"))
    return None if factor is None else as_matrix(factor)[0]


LOKR = ChangeKind("LoKr", tuple(one | other for one in _W1 for other in _W2), _fits, _rank, _read)
