"""Test that work is divided among processes. The other process is played here."""

from __future__ import annotations

from typing import Any

import pytest

from spectune.errors import InputError
from spectune.training.processes import sharing
from spectune.training.processes.sharing import on_any_process, shared


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Make this process the second of two; the first one computes `-item` of each item, in this list."""
    others: list[Any] = []
    monkeypatch.setattr(sharing, "_are_several", lambda: True)
    monkeypatch.setattr(sharing.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(sharing.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(sharing, "gather_object", lambda mine: [others.pop(0), *mine])
    return others


def test_each_item_is_computed_once_and_results_keep_their_order(second_of_two: list[Any]) -> None:
    computed: list[int] = []

    def square(item: int) -> int:
        computed.append(item)
        return item * item

    second_of_two += [(0, None), (4, None), (16, None)]
    assert list(shared(range(5), square)) == [0, 1, 4, 9, 16]
    assert computed == [1, 3]


def test_an_error_of_another_process_is_raised_here_and_printed_there(second_of_two: list[Any]) -> None:
    second_of_two.append((None, InputError("cat.png is damaged")))
    with pytest.raises(InputError, match=r"cat\.png is damaged") as caught:
        list(shared(range(2), lambda item: item))
    assert caught.value.is_reported


def test_one_process_computes_all() -> None:
    assert list(shared("abc", str.upper)) == ["A", "B", "C"]
    assert on_any_process([3, 1, 3]) == [1, 3]


def test_what_one_process_lacks_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_are_several", lambda: True)
    monkeypatch.setattr(sharing, "gather_object", lambda mine: [*mine, 2, 5])
    assert on_any_process([5, 1]) == [1, 2, 5]
