"""Low-rank matrices: factors, the weight shapes they stand for, and the product that all of spectune uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from spectune.core.linalg import column_norms, converted, row_norms, scratch


@dataclass(frozen=True)
class LowRank:
    """A matrix of low rank: scale * up @ down."""

    down: Tensor  # (rank, in) or (rank, in, kh, kw)
    up: Tensor  # (out, rank) or (out, rank, 1, 1)
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


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


# Numbers at a time (1 MiB of float32): what is computed of a tile is used while it is still in the cache.
TILE_ROWS = 256
TILE_COLUMNS = 1024

Tile = tuple[slice, slice]


class Product:
    """scale * up @ down of one layer, tile by tile, in float32.

    Splitting, rebuilding and verifying all call this one product: the residual is exact only if what was
    subtracted is what is added. `exact`, it is summed in float64 and rounded once, so that it is the same
    number on every machine whatever the order of the sum (but for ties of the rounding, one in a billion).
    Otherwise it is summed in float32, twice as fast, and other machines may differ by what `rounding` bounds.
    """

    def __init__(self, low_rank: LowRank, *, exact: bool = True) -> None:
        self.shape = weight_shape(low_rank)
        dtype = torch.float64 if exact else torch.float32
        self._up = to_matrix(low_rank.up).cpu().to(dtype) * low_rank.scale  # (out, rank)
        self._down = to_matrix(low_rank.down).cpu().to(dtype)  # (rank, in*kh*kw)

    def rounding(self) -> tuple[Tensor, Tensor]:
        """Two vectors, (out) and (in*kh*kw), whose outer product bounds how far two float32 sums lie apart.

        A sum of r products is off by at most r u times the sum of their magnitudes (Higham 2002, eq. 3.5),
        which is at most |row of up| |column of down|; twice that for two sums.
        """
        rank = self._up.shape[1]
        up = row_norms(self._up.float()) * (2 * rank * torch.finfo(torch.float32).eps / 2)
        return up, column_norms(self._down.float())

    def tiles(self) -> Iterator[tuple[Tile, Tensor]]:
        """Pieces of the matrix (out, in*kh*kw), each as its place and its numbers.

        The numbers stand in scratch memory: they are good until the next piece is asked for.
        """
        rows, columns = self._up.shape[0], self._down.shape[1]
        for left in range(0, columns, TILE_COLUMNS):
            across = slice(left, min(left + TILE_COLUMNS, columns))
            down = self._down[:, across].contiguous()
            for top in range(0, rows, TILE_ROWS):
                along = slice(top, min(top + TILE_ROWS, rows))
                shape = (along.stop - top, across.stop - left)
                numbers = torch.mm(self._up[along], down, out=scratch("product", shape, down.dtype))
                if down.dtype != torch.float32:
                    numbers = converted("product", numbers, torch.float32)
                yield (along, across), numbers


def product(low_rank: LowRank) -> Tensor:
    """scale * up @ down as a float32 weight of shape (out, in) or (out, in, kh, kw), on the CPU."""
    whole = Product(low_rank)
    result = torch.empty(whole.shape)
    matrix = to_matrix(result)
    for tile, numbers in whole.tiles():
        matrix[tile] = numbers
    return result


def common_type(types: Sequence[torch.dtype]) -> torch.dtype:
    """The narrowest type that holds the numbers of all `types`; beside others, eight bits count as 32."""
    if len(set(types)) == 1:
        return types[0]
    wide = [torch.float32 if dtype.itemsize == 1 else dtype for dtype in types]
    return reduce(torch.promote_types, wide)
