"""What the kinds of adapters share: the interface of a change, and the record of a kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # suffix of a key -> shape
Tensors = Mapping[str, Tensor]  # suffix of a key -> tensor


class WeightChange(Protocol):
    """The change of one layer."""

    def change(self, weight: Tensor, strength: float) -> Tensor:
        """Return W' - W in float32, in the shape of W.

        Args:
            weight: W in float32; it is not changed.
            strength: 1 applies the change as trained.
        """
        ...


@dataclass(frozen=True)
class ChangeKind:
    """How to recognize and read the layers of a kind."""

    name: str  # in messages
    suffixes: tuple[frozenset[str], ...]  # each is one complete set of keys, without alpha
    fits: Callable[[Shapes, Shape], bool]  # whether tensors of these shapes fit a weight of this shape
    rank: Callable[[Shapes], int | None]  # the scale is alpha / rank; None if the kind has no such scale
    read: Callable[[Tensors, float | None, Shape], WeightChange]  # from tensors, alpha, shape of the weight


def as_matrix(shape: Shape) -> Shape:
    """Return the shape of a kernel as a matrix (out, in*kh*kw); (0, 0) for a number."""
    return (shape[0], math.prod(shape[1:])) if shape else (0, 0)


def no_rank(_: Shapes) -> None:
    """Return None: the kind has no scale alpha / rank."""


def scale_of(alpha: float | None, rank: int) -> float:
    """Return alpha / rank; 1 without alpha."""
    return 1.0 if alpha is None else alpha / rank
