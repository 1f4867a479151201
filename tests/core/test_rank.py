"""Ranks from a fixed rank, a share of energy, or a byte budget."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectune.core.rank import (
    BudgetRank,
    EnergyRank,
    FixedRank,
    Price,
    best_ranks,
    full_rank,
    rank_for_energy,
)
from spectune.errors import InputError


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((640, 640), 64), ((640, 320, 1, 1), 64), ((640, 320, 3, 3), 16), ((4, 320, 3, 3), 4)],
)
def test_conv_rank_applies_to_large_kernels(shape: tuple[int, ...], expected: int) -> None:
    assert FixedRank(64, conv_rank=16).true_rank(shape) == expected


def test_without_conv_rank_all_layers_have_one_rank() -> None:
    assert FixedRank(64).true_rank((640, 320, 3, 3)) == 64
    assert full_rank((320, 4, 3, 3)) == 36


def test_invalid_ranks_are_refused() -> None:
    with pytest.raises(InputError, match="`rank` is 0: expected at least 1"):
        FixedRank(0)
    with pytest.raises(InputError, match="`conv_rank` is -1"):
        FixedRank(4, conv_rank=-1)
    with pytest.raises(InputError, match="`energy` is 0: expected a share above 0, at most 1"):
        EnergyRank(0.0)
    with pytest.raises(InputError, match="`energy` is 90") as caught:
        EnergyRank(90.0)
    assert caught.value.hint == "write 0.9 for 90 %"
    with pytest.raises(InputError, match="`energy` is nan"):
        EnergyRank(float("nan"))
    with pytest.raises(InputError, match="`max_rank` is 0"):
        EnergyRank(0.9, max_rank=0)
    with pytest.raises(InputError, match="`budget` is 0 bytes"):
        BudgetRank(0)


@pytest.mark.parametrize(("share", "rank"), [(0.5, 1), (0.8, 1), (0.81, 2), (0.95, 2), (1.0, 3), (1e-9, 1)])
def test_the_smallest_rank_that_holds_the_share(share: float, rank: int) -> None:
    values = torch.tensor([4.0, 3.0**0.5, 1.0, 0.0], dtype=torch.float64)  # squares 16, 3, 1, 0
    assert rank_for_energy(values, share) == rank


def test_a_share_reached_up_to_rounding_counts() -> None:
    assert rank_for_energy(torch.full((10,), 0.1).double(), 0.9) == 9
    assert rank_for_energy(torch.full((10,), 0.1).double(), 0.9 * (1 + 1e-9)) == 10


def test_a_zero_matrix_needs_no_direction() -> None:
    assert rank_for_energy(torch.zeros(4).double(), 0.9) == 0


def captured(spectra: list[Tensor], ranks: tuple[int, ...]) -> float:
    return sum(float(values[:rank].square().sum()) for values, rank in zip(spectra, ranks, strict=True))


def best_by_trying_all(spectra: list[Tensor], costs: list[int], budget: int) -> float:
    choices = product(*(range(len(values) + 1) for values in spectra))
    affordable = (r for r in choices if sum(n * c for n, c in zip(r, costs, strict=True)) <= budget)
    return max(captured(spectra, ranks) for ranks in affordable)


def spent(ranks: tuple[int, ...], costs: list[int]) -> int:
    return sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))


def prices(costs: list[int]) -> list[Price]:
    return [Price(entry=0, direction=cost) for cost in costs]


def descending(values: list[float]) -> Tensor:
    return torch.tensor(sorted(values, reverse=True), dtype=torch.float64)


SPECTRA = st.lists(
    st.lists(st.floats(0.01, 10.0), min_size=1, max_size=4).map(descending), min_size=1, max_size=4
)
COSTS = st.lists(st.integers(1, 9), min_size=4, max_size=4)


@settings(max_examples=80, deadline=None)
@given(spectra=SPECTRA, costs=COSTS, budget=st.integers(0, 60))
def test_the_greedy_choice_is_within_one_direction_of_the_best(
    spectra: list[Tensor], costs: list[int], budget: int
) -> None:
    costs = costs[: len(spectra)]
    ranks = best_ranks(spectra, prices(costs), budget)
    assert spent(ranks, costs) <= budget
    missed = best_by_trying_all(spectra, costs, budget) - captured(spectra, ranks)
    left_out = [float(s[rank] ** 2) for s, rank in zip(spectra, ranks, strict=True) if rank < len(s)]
    assert missed <= max(left_out, default=0.0) + 1e-9


@settings(max_examples=60, deadline=None)
@given(spectra=SPECTRA, cost=st.integers(1, 5), budget=st.integers(0, 40))
def test_with_equal_prices_the_greedy_choice_is_the_best(
    spectra: list[Tensor], cost: int, budget: int
) -> None:
    costs = [cost] * len(spectra)
    ranks = best_ranks(spectra, prices(costs), budget)
    assert captured(spectra, ranks) == pytest.approx(best_by_trying_all(spectra, costs, budget), rel=1e-12)


def test_a_greedy_choice_without_unused_bytes_is_the_best() -> None:
    spectra = [descending([3.0, 2.0, 1.0]), descending([4.0, 1.5, 0.5])]
    costs = [2, 5]
    for budget in range(1, 22):
        ranks = best_ranks(spectra, prices(costs), budget)
        if budget in (2, 7, 9):  # densities 9/2, 16/5, 4/2: prefixes of the greedy order end here
            assert spent(ranks, costs) == budget
            assert captured(spectra, ranks) == pytest.approx(best_by_trying_all(spectra, costs, budget))
    # ordering by energy per direction instead of per byte would start with the second layer
    assert best_ranks(spectra, prices(costs), 6) == (3, 0)
    assert best_ranks(spectra, prices([2, 3]), 3) == (0, 1)


def test_ties_go_to_the_earlier_layer() -> None:
    flat = descending([1.0, 1.0, 1.0])
    assert best_ranks([flat, flat], prices([1, 1]), 4) == (3, 1)


def test_directions_without_energy_are_not_taken() -> None:
    assert best_ranks([descending([1.0, 0.0]), torch.zeros(3).double()], prices([1, 1]), 99) == (1, 0)
    assert best_ranks([], [], 99) == ()


def test_the_entry_of_a_layer_is_charged_once() -> None:
    spectra = [descending([3.0, 2.0]), descending([2.5, 1.0])]
    charged = [Price(entry=10, direction=1)] * 2
    assert best_ranks(spectra, charged, 12) == (2, 0)  # the second layer would cost 11
    assert best_ranks(spectra, charged, 23) == (2, 1)
    assert best_ranks(spectra, charged, 10) == (0, 0)
