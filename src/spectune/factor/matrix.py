"""Weights as matrices, and the one product of low-rank factors that all of spectune uses."""

from __future__ import annotations

import torch
from torch import Tensor

from spectune.weights.adapter import Delta, LowRank


def to_matrix(weight: Tensor) -> Tensor:
    """The weight of a linear or convolution as a matrix of shape (out, in) or (out, in*kh*kw)."""
    return weight.reshape(weight.shape[0], -1)


def from_matrix(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `to_matrix`: the weight of the given shape."""
    return matrix.reshape(shape)


def to_factors(up: Tensor, down: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Matrices (out, rank) and (rank, in*kh*kw) as the factors (up, down) of a weight of the given shape.

    A convolution gets down (rank, in, kh, kw) and up (out, rank, 1, 1), a linear layer keeps its matrices.
    """
    ones = (1,) * (len(shape) - 2)
    return up.reshape(*up.shape, *ones).contiguous(), down.reshape(down.shape[0], *shape[1:]).contiguous()


def weight_shape(low_rank: LowRank) -> tuple[int, ...]:
    """The shape of the weight that the factors stand for."""
    return (low_rank.up.shape[0], *low_rank.down.shape[1:])


def product(low_rank: LowRank) -> Tensor:
    """scale * up @ down as a float32 weight of shape (out, in) or (out, in, kh, kw).

    Splitting, rebuilding and verifying all call this one function: the residual is exact only if the
    product that was subtracted is the product that is added.
    """
    # float32: fp16 products lose what the residual was made to carry, and bf16 more so
    up = to_matrix(low_rank.up).float()  # (out, rank)
    down = to_matrix(low_rank.down).float()  # (rank, in*kh*kw)
    result = up @ down  # (out, in*kh*kw)
    if low_rank.scale != 1.0:
        result *= low_rank.scale
    return from_matrix(result, weight_shape(low_rank))


def joined(delta: Delta) -> LowRank:
    """The change of a tuned layer as one pair of rank 2r in float32: [dB, B0] [A0+dA; dA]."""
    frame = delta.frame
    change_down, change_up = delta.down.float(), delta.up.float()
    down = torch.cat([frame.down.float() + change_down, change_down])  # (2 rank, in, ...)
    up = torch.cat([change_up, frame.up.float()], dim=1)  # (out, 2 rank, ...)
    return LowRank(down=down, up=up, alpha=frame.scale * down.shape[0])


def absolute(delta: Delta) -> LowRank:
    """The tuned factors themselves in float32, (B0+dB) and (A0+dA): what stands beside the residual."""
    frame = delta.frame
    down = frame.down.float() + delta.down.float()
    up = frame.up.float() + delta.up.float()
    return LowRank(down=down, up=up, alpha=frame.alpha)


def change(layer: LowRank | Delta) -> Tensor:
    """What an adapter adds to the weight of one layer, in float32 and in the shape of the weight."""
    return product(joined(layer) if isinstance(layer, Delta) else layer)
