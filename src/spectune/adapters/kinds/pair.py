"""LoRA and LoCon: a product of two factors, or of three as LoCon's Tucker form."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectune.adapters.adapter import DOWN, MID, UP
from spectune.adapters.kinds.change import ChangeKind, Shape, Shapes, Tensors, as_matrix
from spectune.core.low_rank import LowRank, product


@dataclass(frozen=True)
class Pair:
    """W + scale * B A."""

    low_rank: LowRank

    def change(self, weight: Tensor, strength: float) -> Tensor:
        scaled = replace(self.low_rank, alpha=self.low_rank.alpha * strength)
        return product(scaled).reshape(weight.shape)


def read_low_rank(tensors: Tensors, alpha: float | None, weight: Shape) -> LowRank:
    """Return the factors of a layer; without alpha, the scale is 1."""
    down, up = tensors[DOWN], tensors[UP]
    rank = down.shape[0]
    if MID in tensors:
        down, mid, up = down.float(), tensors[MID].float(), up.float()
        # LyCORIS's Tucker form: W[o,i,h,w] = sum_mn up[o,m] mid[m,n,h,w] down[n,i]. Joined to two factors.
        down = torch.einsum("mnhw,ni->mihw", mid, down.flatten(1))
    ones = (1,) * (len(weight) - 2)
    return LowRank(
        down=down.reshape(rank, *weight[1:]),
        up=up.reshape(weight[0], rank, *ones),
        alpha=float(rank) if alpha is None else alpha,
    )


def _read(tensors: Tensors, alpha: float | None, weight: Shape) -> Pair:
    return Pair(read_low_rank(tensors, alpha, weight))


def _fits(shapes: Shapes, weight: Shape) -> bool:
    down, up = as_matrix(shapes[DOWN]), as_matrix(shapes[UP])
    rank = down[0]
    if MID not in shapes:
        return down == (rank, as_matrix(weight)[1]) and up == (weight[0], rank)
    return down == (rank, weight[1]) and up == (weight[0], rank) and shapes[MID] == (rank, rank, *weight[2:])


def _rank(shapes: Shapes) -> int:
    return as_matrix(shapes[DOWN])[0]


PAIR = ChangeKind("LoRA", (frozenset({DOWN, UP}), frozenset({DOWN, UP, MID})), _fits, _rank, _read)
