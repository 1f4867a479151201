"""OFT: rotate blocks of rows, with rotations in Cayley's form (Qiu et al. 2023, arXiv 2306.07280).

LyCORIS (algo=diag-oft) and sd-scripts (networks.oft) store the same blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from spectune.adapters.kinds.change import ChangeKind, Shape, Shapes, Tensors, no_rank
from spectune.core.low_rank import to_matrix

_linalg: Any = torch.linalg
BLOCKS, RESCALE = "oft_blocks", "rescale"
OFT_SUFFIXES = (frozenset({BLOCKS}), frozenset({BLOCKS, RESCALE}))


@dataclass(frozen=True)
class OFT:
    """W + s * (m R^T W - W), with R = (I + Q) (I - Q)^-1 for every block of rows."""

    rotations: Tensor  # R (blocks, size, size), float64
    rescale: Tensor | None  # m (out, 1), float64

    def change(self, weight: Tensor, strength: float) -> Tensor:
        exact = to_matrix(weight).double()
        blocks = exact.reshape(*self.rotations.shape[:2], -1)
        rotated = torch.bmm(self.rotations.mT, blocks).reshape(exact.shape)
        if self.rescale is not None:
            rotated *= self.rescale
        return rotated.sub_(exact).mul_(strength).float().reshape(weight.shape)


def rotations(blocks: Tensor, alpha: float | None, out: int) -> Tensor:
    """Return R in float64 from trained blocks (..., size, size).

    A positive alpha limits the norm of all Q = blocks - blocks^T together to alpha * out.
    """
    q = blocks.double()
    q = q - q.mT
    if alpha is not None and alpha > 0:
        size = float(q.square().sum().sqrt()) + 1e-8
        q = q * min(alpha * out / size, 1.0)
    identity = torch.eye(q.shape[-1], dtype=q.dtype)
    # (I + Q) and (I - Q)^-1 commute
    return cast("Tensor", _linalg.solve(identity - q, identity + q))


def read_rescale(tensors: Tensors, weight: Shape) -> Tensor | None:
    """Return the factor of every row as (out, 1) in float64."""
    return tensors[RESCALE].double().reshape(weight[0], 1) if RESCALE in tensors else None


def rescale_fits(shapes: Shapes, weight: Shape) -> bool:
    """Return whether there is no factor of rows, or one factor per row."""
    return RESCALE not in shapes or as_column(shapes[RESCALE]) == weight[0]


def as_column(shape: Shape) -> int | None:
    """Return the length of a shape (n, 1, ...); None for another shape."""
    return shape[0] if shape and all(axis == 1 for axis in shape[1:]) else None


def _read(tensors: Tensors, alpha: float | None, weight: Shape) -> OFT:
    return OFT(rotations(tensors[BLOCKS], alpha, weight[0]), read_rescale(tensors, weight))


def _fits(shapes: Shapes, weight: Shape) -> bool:
    blocks = shapes[BLOCKS]
    if len(blocks) != 3 or blocks[1] != blocks[2] or blocks[0] * blocks[1] != weight[0]:
        return False
    return rescale_fits(shapes, weight)


OFT_KIND = ChangeKind("OFT", OFT_SUFFIXES, _fits, no_rank, _read)
