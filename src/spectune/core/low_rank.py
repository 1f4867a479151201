"""Low-rank matrices: their factors, the shapes of their weights, and their product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from spectune.core.linalg import column_norms, row_norms, scratch, scratch_copy


@dataclass(frozen=True)
class LowRank:
    """A low-rank matrix: scale * up @ down."""

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
    """Return the weight of a linear layer or convolution as a matrix (out, in) or (out, in*kh*kw)."""
    return weight.reshape(weight.shape[0], -1)


def from_matrix(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a matrix as a weight of the given shape; the inverse of `to_matrix`."""
    return matrix.reshape(shape)


def to_factors(up: Tensor, down: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return matrices (out, rank) and (rank, in*kh*kw) as factors (up, down) of a weight of the given shape.

    The factors of a convolution are up (out, rank, 1, 1) and down (rank, in, kh, kw).
    """
    ones = (1,) * (len(shape) - 2)
    return up.reshape(*up.shape, *ones).contiguous(), down.reshape(down.shape[0], *shape[1:]).contiguous()


def weight_shape(low_rank: LowRank) -> tuple[int, ...]:
    """Return the shape of the weight that the factors represent."""
    return (low_rank.up.shape[0], *low_rank.down.shape[1:])


# A tile has 1 MiB in float32, so that it stays in the CPU cache.
TILE_ROWS = 256
TILE_COLUMNS = 1024
WHOLE_ROWS = 2 * TILE_COLUMNS

Tile = tuple[slice, slice]


class Product:
    """The product scale * up @ down of one layer, computed tile by tile, in float32.

    Split, rebuild and verify all use this class, because a residual is exact only if the subtracted and the
    added values are the same. With `exact`, sums are computed in float64 and rounded once. This gives the
    same values on every machine, for any order of summation, except for rounding ties (one in a billion).
    Otherwise sums are in float32, which is twice as fast, and other machines may differ within the bound of
    `rounding`.
    """

    def __init__(self, low_rank: LowRank, *, exact: bool = True) -> None:
        self.shape = weight_shape(low_rank)
        dtype = torch.float64 if exact else torch.float32
        self._up = to_matrix(low_rank.up).cpu().to(dtype) * low_rank.scale  # (out, rank)
        self._down = to_matrix(low_rank.down).cpu().to(dtype)  # (rank, in*kh*kw)

    def rounding(self) -> tuple[Tensor, Tensor]:
        """Return vectors (out) and (in*kh*kw) whose outer product bounds the difference of two float32 sums.

        The error of a sum of r products is at most r u times the sum of their magnitudes (Higham 2002, eq.
        3.5), which is at most |row of up| |column of down|. The difference of two sums has twice this bound.
        """
        rank = self._up.shape[1]
        up = row_norms(self._up.float()) * (2 * rank * torch.finfo(torch.float32).eps / 2)
        return up, column_norms(self._down.float())

    def tiles(self) -> Iterator[tuple[Tile, Tensor]]:
        """Yield tiles of the matrix (out, in*kh*kw): the slices of each tile and its values.

        The values are in scratch memory and only valid until the next tile. A matrix of at most
        WHOLE_ROWS columns has tiles of whole rows, which are contiguous in the weight.
        """
        rows, columns = self._up.shape[0], self._down.shape[1]
        width = columns if columns <= WHOLE_ROWS else TILE_COLUMNS
        for left in range(0, columns, width):
            across = slice(left, min(left + width, columns))
            # every product has at most TILE_COLUMNS columns: another size can change the last digit of a sum
            downs = [part.contiguous() for part in torch.split(self._down[:, across], TILE_COLUMNS, 1)]
            for top in range(0, rows, TILE_ROWS):
                along = slice(top, min(top + TILE_ROWS, rows))
                shape = (along.stop - top, across.stop - left)
                values = scratch("product", shape, self._down.dtype)
                for down, part in zip(downs, torch.split(values, TILE_COLUMNS, 1), strict=True):
                    torch.mm(self._up[along], down, out=part)
                if values.dtype != torch.float32:
                    values = scratch_copy("product", values, torch.float32)
                yield (along, across), values


def product(low_rank: LowRank) -> Tensor:
    """Return scale * up @ down as a float32 weight of shape (out, in) or (out, in, kh, kw), on the CPU."""
    tiled = Product(low_rank)
    result = torch.empty(tiled.shape)
    matrix = to_matrix(result)
    for tile, values in tiled.tiles():
        matrix[tile] = values
    return result


def common_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """Return the narrowest dtype that holds values of all `dtypes`; fp8 mixed with others gives float32."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    wide = [torch.float32 if dtype.itemsize == 1 else dtype for dtype in dtypes]
    return reduce(torch.promote_types, wide)
