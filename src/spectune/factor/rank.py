"""How many singular directions each layer keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from spectune.errors import InputError


class RankRule(Protocol):
    """Chooses the rank of a layer from the shape of its weight; the layer's size may limit it further."""

    def wanted(self, shape: tuple[int, ...]) -> int: ...


def full_rank(shape: tuple[int, ...]) -> int:
    """The largest rank that a weight of this shape can have: min(out, in*kh*kw)."""
    return min(shape[0], math.prod(shape[1:]))


def rank_of(rule: RankRule, shape: tuple[int, ...]) -> int:
    """The true rank that a rule gives to a weight of this shape."""
    return min(rule.wanted(shape), full_rank(shape))


@dataclass(frozen=True)
class FixedRank:
    """One rank for all layers; `conv_rank` for convolutions larger than 1x1, as sd-scripts and LyCORIS do.

    A layer smaller than the rank keeps its full rank, and says so in the report.
    """

    rank: int
    conv_rank: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("conv rank", self.conv_rank)):
            if value is not None and value < 1:
                hint = "64 fits SDXL on a 12 GB GPU"
                raise InputError(f"{name} is {value}: expected at least 1", hint=hint)

    def wanted(self, shape: tuple[int, ...]) -> int:
        large_kernel = math.prod(shape[2:]) > 1
        return self.conv_rank if large_kernel and self.conv_rank is not None else self.rank
