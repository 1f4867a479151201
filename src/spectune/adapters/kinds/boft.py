"""BOFT: a product of rotations, each of other blocks of rows (Liu et al. 2024, arXiv 2311.06243; LyCORIS)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.adapters.kinds.change import ChangeKind, Shape, Shapes, Tensors, no_rank
from spectune.adapters.kinds.oft import (
    BLOCKS,
    OFT_SUFFIXES,
    read_rescale,
    rescale_fits,
    rotations,
)
from spectune.core.low_rank import to_matrix


@dataclass(frozen=True)
class BOFT:
    """m R_k ... R_2 R_1 W; the strength moves every R_i between the identity and R_i, as in LyCORIS."""

    stages: Tensor  # R_i (stages, blocks, size, size), float64
    rescale: Tensor | None  # m (out, 1), float64

    def change(self, weight: Tensor, strength: float) -> Tensor:
        exact = to_matrix(weight).double()
        size = self.stages.shape[-1]
        identity = torch.eye(size, dtype=exact.dtype)
        rotated = exact
        for index, stage in enumerate(self.stages):
            order = _order(len(exact), 2**index * (size // 2))
            blocks = rotated[order].reshape(-1, size, exact.shape[1])
            turned = torch.bmm(strength * stage + (1 - strength) * identity, blocks)
            rotated = torch.empty_like(exact)
            rotated[order] = turned.reshape(exact.shape)
        if self.rescale is not None:
            rotated = rotated * self.rescale
        return (rotated - exact).float().reshape(weight.shape)


def _order(rows: int, half: int) -> Tensor:
    """Return the rows in the order in which a stage rotates them: row i next to row i + half."""
    return torch.arange(rows).reshape(-1, 2, half).transpose(1, 2).reshape(-1)


def _read(tensors: Tensors, alpha: float | None, weight: Shape) -> BOFT:
    return BOFT(rotations(tensors[BLOCKS], alpha, weight[0]), read_rescale(tensors, weight))


def _fits(shapes: Shapes, weight: Shape) -> bool:
    if len(shapes[BLOCKS]) != 4 or not rescale_fits(shapes, weight):
        return False
    stages, count, size, other = shapes[BLOCKS]
    if size != other or size % 2 or count * size != weight[0] or stages > weight[0]:
        return False
    # the last stage joins the rows that are farthest apart
    return weight[0] % (2 ** (stages - 1) * size) == 0


BOFT_KIND = ChangeKind("BOFT", OFT_SUFFIXES, _fits, no_rank, _read)
