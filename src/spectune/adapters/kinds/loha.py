"""LoHa: the elementwise product of two low-rank matrices (Hyeon-Woo et al. 2022, arXiv 2108.06098)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectune.adapters.kinds.change import ChangeKind, Shape, Shapes, Tensors, as_matrix, scale_of
from spectune.core.low_rank import LowRank, product

_HALVES = (("hada_w1_a", "hada_w1_b", "hada_t1"), ("hada_w2_a", "hada_w2_b", "hada_t2"))
_PLAIN = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})


@dataclass(frozen=True)
class LoHa:
    """W + scale * (B1 A1) * (B2 A2)."""

    one: LowRank  # with the scale
    other: LowRank

    def change(self, weight: Tensor, strength: float) -> Tensor:
        scaled = replace(self.one, alpha=self.one.alpha * strength)
        return product(scaled).mul_(product(self.other)).reshape(weight.shape)


def _read(tensors: Tensors, alpha: float | None, weight: Shape) -> LoHa:
    one, other = (_half(tensors, names) for names in _HALVES)
    scale = scale_of(alpha, tensors["hada_w1_b"].shape[0])
    return LoHa(replace(one, alpha=one.alpha * scale), other)


def _half(tensors: Tensors, names: tuple[str, str, str]) -> LowRank:
    a, b = tensors[names[0]].double().flatten(1), tensors[names[1]].double().flatten(1)
    if names[2] in tensors:
        # LyCORIS's Tucker form: W[o,i,h,w] = sum_mn a[m,o] t[m,n,h,w] b[n,i]
        down = torch.einsum("mnhw,ni->mihw", tensors[names[2]].double(), b)
        return LowRank(down.flatten(1), a.T, float(len(a)))
    return LowRank(b, a, float(len(b)))


def _fits(shapes: Shapes, weight: Shape) -> bool:
    return all(_half_fits(shapes, names, weight) for names in _HALVES)


def _half_fits(shapes: Shapes, names: tuple[str, str, str], weight: Shape) -> bool:
    a, b = as_matrix(shapes[names[0]]), as_matrix(shapes[names[1]])
    rank = b[0]
    if names[2] in shapes:
        core = (rank, rank, *weight[2:])
        return a == (rank, weight[0]) and b == (rank, weight[1]) and shapes[names[2]] == core
    return a == (weight[0], rank) and b == (rank, as_matrix(weight)[1])


def _rank(shapes: Shapes) -> int:
    return as_matrix(shapes["hada_w1_b"])[0]


LOHA = ChangeKind("LoHa", (_PLAIN, _PLAIN | {"hada_t1", "hada_t2"}), _fits, _rank, _read)
