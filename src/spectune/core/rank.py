"""Choose the ranks of layers: by a fixed rank, a share of energy, or a file size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from spectune.errors import InputError

_ROUNDING = 1e-12  # tolerance for the rounding of sums of energies


def full_rank(shape: tuple[int, ...]) -> int:
    """Return the largest rank that a weight of this shape can have: min(out, in*kh*kw)."""
    return min(shape[0], math.prod(shape[1:]))


@dataclass(frozen=True)
class FixedRank:
    """One rank for all layers, or `conv_rank` for convolutions larger than 1x1 as in sd-scripts and LyCORIS.

    A layer smaller than the rank keeps its full rank, and its report has `capped` set.
    """

    rank: int
    conv_rank: int | None = None

    def __post_init__(self) -> None:
        _check_rank("rank", self.rank)
        _check_rank("conv_rank", self.conv_rank)

    def requested(self, shape: tuple[int, ...]) -> int:
        """Return the requested rank for a weight of this shape; it may exceed the full rank."""
        large_kernel = math.prod(shape[2:]) > 1
        return self.conv_rank if large_kernel and self.conv_rank is not None else self.rank

    def true_rank(self, shape: tuple[int, ...]) -> int:
        """Return the requested rank, at most the full rank of the shape."""
        return min(self.requested(shape), full_rank(shape))


@dataclass(frozen=True)
class EnergyRank:
    """For each layer, the smallest rank that holds `share` of its squared Frobenius norm, 0 < share <= 1.

    `max_rank` limits the rank of layers with a flat spectrum.
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
            raise InputError(f"`energy` is {self.share:g}: expected a share above 0, at most 1", hint=hint)
        _check_rank("max_rank", self.max_rank)


@dataclass(frozen=True)
class BudgetRank:
    """The ranks that hold the most energy in a principal file of at most `nbytes` bytes."""

    nbytes: int

    def __post_init__(self) -> None:
        if self.nbytes < 1:
            raise InputError(f"`budget` is {self.nbytes} bytes: expected at least 1", hint="try 600MB")


def _check_rank(field: str, rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise InputError(f"`{field}` is {rank}: expected at least 1", hint="64 fits SDXL on a 12 GB GPU")


def rank_for_energy(values: Tensor, share: float) -> int:
    """Return the smallest rank that holds `share` of the sum of squared singular values; 0 if all are 0."""
    captured = values.double().square().cumsum(0)
    total = float(captured[-1])
    if total == 0.0:
        return 0
    return min(int((captured < share * (1 - _ROUNDING) * total).sum()) + 1, len(values))


@dataclass(frozen=True)
class Price:
    """The bytes of a layer in a file."""

    entry: int  # once, if its rank is not 0
    direction: int  # per rank


def best_ranks(spectra: Sequence[Tensor], prices: Sequence[Price], budget: int) -> tuple[int, ...]:
    """Return the ranks that hold the most energy in `budget` bytes; `spectra` are descending.

    Greedy algorithm: direction i of a layer adds the energy s_i^2 and costs price.direction bytes. Directions
    are taken in the order of energy per byte, largest first. Within a layer the energy only decreases, so
    this solves the knapsack problem with divisible directions (Dantzig 1957, doi 10.1287/opre.5.2.266): no
    other choice of the same number of bytes holds more energy, and the unused bytes lose less than the first
    direction that did not fit. A layer ends at its first direction that does not fit; other layers continue.
    The first direction of a layer also pays for its entry; entries do not change the order. Ties go to the
    earlier layer. Directions without energy are not taken.
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
    """Return the layer of every direction with energy, sorted by energy per byte, largest first."""
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
