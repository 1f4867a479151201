from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectune.errors import InputError
from spectune.training.data.buckets import Size
from spectune.training.data.plan import BatchPlan, PlannedBatches

BUCKETS = {Size(8, 8): [(0, 3), (1, 1), (2, 2)], Size(8, 16): [(3, 5)]}


def plan(batch: int = 2, seed: int = 1) -> BatchPlan:
    return BatchPlan(BUCKETS, batch=batch, seed=seed)


@given(st.integers(1, 7), st.integers(0, 5))
def test_an_epoch_draws_every_repeat_once_and_never_mixes_sizes(batch: int, epoch: int) -> None:
    batches = plan(batch).epoch(epoch)
    assert len(batches) == plan(batch).batches_per_epoch
    assert Counter(draw.image for drawn in batches for draw in drawn) == {0: 3, 1: 1, 2: 2, 3: 5}
    assert len({(draw.image, draw.repeat) for drawn in batches for draw in drawn}) == 11
    for drawn in batches:
        assert len({draw.image == 3 for draw in drawn}) == 1
        assert len(drawn) <= batch


@given(st.integers(0, 20), st.integers(0, 20))
def test_a_resumed_plan_is_the_rest_of_the_plan(start: int, more: int) -> None:
    batches = list(PlannedBatches(plan(), 0, start + more))
    assert list(PlannedBatches(plan(), start, start + more)) == batches[start:]
    assert [drawn[0].position for drawn in batches] == list(range(start + more))


def test_epochs_and_seeds_differ() -> None:
    order = [
        [draw.image for drawn in plan(seed=seed).epoch(epoch) for draw in drawn]
        for seed, epoch in ((1, 0), (1, 1), (2, 0))
    ]
    assert order[0] != order[1]
    assert order[0] != order[2]


def test_the_order_of_a_seed_never_changes() -> None:
    """Pin the order, because a run must be able to resume after an update of spectune."""
    drawn = [[(draw.image, draw.repeat) for draw in draws] for draws in plan().epoch(1)]
    assert drawn == [
        [(2, 1), (2, 0)],
        [(3, 1), (3, 0)],
        [(0, 1), (1, 0)],
        [(3, 3), (3, 4)],
        [(3, 2)],
        [(0, 2), (0, 0)],
    ]


def test_an_epoch_of_too_many_draws_is_refused() -> None:
    images = [(index, 10_000) for index in range(30_000)]
    with pytest.raises(InputError, match="an epoch has 300,000,000 draws: at most 200,000,000"):
        BatchPlan({Size(8, 8): images}, batch=2, seed=1)
