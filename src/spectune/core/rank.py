"""How many singular directions each layer keeps: the three ways to ask, and the mathematics of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from spectune.errors import InputError

# A share that is met but for the rounding of its sum is met.
_ROUNDING = 1e-12


def full_rank(shape: tuple[int, ...]) -> int:
    """The largest rank that a weight of this shape can have: min(out, in*kh*kw)."""
    return min(shape[0], math.prod(shape[1:]))


@dataclass(frozen=True)
class FixedRank:
    """One rank for all layers; `conv_rank` for convolutions larger than 1x1, as sd-scripts and LyCORIS do.

    A layer smaller than the rank keeps its full rank, and says so in the report.
    """

    rank: int
    conv_rank: int | None = None

    def __post_init__(self) -> None:
        _check_rank("rank", self.rank)
        _check_rank("conv rank", self.conv_rank)

    def wanted(self, shape: tuple[int, ...]) -> int:
        large_kernel = math.prod(shape[2:]) > 1
        return self.conv_rank if large_kernel and self.conv_rank is not None else self.rank


@dataclass(frozen=True)
class EnergyRank:
    """For each layer the smallest rank that holds `share` of its squared Frobenius norm, 0 < share <= 1.

    `max_rank` caps it where a flat spectrum asks for more than is wanted.
    """

    share: float
    max_rank: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            hint = (
                f"write {self.share / 100:g} for {self.share:g} %"
                if 1.0 < self.share <= 100.0
                else "0.9 keeps 90 %"
            )
            raise InputError(f"energy is {self.share:g}: expected a share above 0 and up to 1", hint=hint)
        _check_rank("the largest rank", self.max_rank)


@dataclass(frozen=True)
class BudgetRank:
    """The ranks that hold the most energy in a principal file of at most `nbytes`."""

    nbytes: int

    def __post_init__(self) -> None:
        if self.nbytes < 1:
            raise InputError(f"the budget is {self.nbytes} bytes: expected more than none", hint="try 600MB")


def _check_rank(name: str, rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise InputError(f"{name} is {rank}: expected at least 1", hint="64 fits SDXL on a 12 GB GPU")


def rank_of(rule: FixedRank, shape: tuple[int, ...]) -> int:
    """The true rank that a fixed rank gives to a weight of this shape."""
    return min(rule.wanted(shape), full_rank(shape))


def rank_for_energy(values: Tensor, share: float) -> int:
    """The smallest rank whose singular values hold `share` of the sum of squares; 0 for a zero matrix."""
    captured = values.double().square().cumsum(0)
    total = float(captured[-1])
    if total == 0.0:
        return 0
    return min(int((captured < share * (1 - _ROUNDING) * total).sum()) + 1, len(values))


@dataclass(frozen=True)
class Price:
    """What a layer costs in bytes: once if it takes part at all, and for each of its directions."""

    entry: int
    direction: int


def best_ranks(spectra: Sequence[Tensor], prices: Sequence[Price], budget: int) -> tuple[int, ...]:
    """Ranks of layers with these singular values (descending) that hold the most energy for `budget` bytes.

    Greedy: direction i of a layer adds s_i^2 for price.direction bytes, and the most energy per byte goes
    first. The gains of a layer only fall, so this solves the knapsack problem with divisible directions
    (Dantzig 1957, doi 10.1287/opre.5.2.266): no choice of as many bytes of directions holds more, and what
    the last bytes could have held instead is less than the first direction that did not fit. That one ends
    its layer; the others go on. Entries are charged when a layer comes in and do not change the order.
    Ties go to the earlier layer; directions without energy are not taken.
    """
    ranks, open_layers = [0] * len(spectra), set(range(len(spectra)))
    left = budget
    for layer in _by_density(spectra, prices):
        if layer not in open_layers:
            continue
        price = prices[layer].direction + (0 if ranks[layer] else prices[layer].entry)
        if price > left:
            open_layers.remove(layer)
            if not open_layers:
                break
            continue
        ranks[layer] += 1
        left -= price
    return tuple(ranks)


def _by_density(spectra: Sequence[Tensor], prices: Sequence[Price]) -> list[int]:
    """The layer of every direction that has energy, by falling energy per byte."""
    if not spectra:
        return []
    gains = torch.cat([values.double().square() for values in spectra])
    counts = torch.tensor([len(values) for values in spectra])
    bytes_each = torch.tensor([price.direction for price in prices], dtype=torch.float64)
    density = gains / bytes_each.repeat_interleave(counts)
    layers = torch.arange(len(spectra)).repeat_interleave(counts)
    order = density.argsort(descending=True, stable=True)
    order = order[: int((density > 0).sum())]
    return cast("list[int]", cast("Any", layers[order]).tolist())
