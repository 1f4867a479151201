"""Work that the processes of a run divide: each item is computed once, and all processes get all results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar, cast

from accelerate.utils import gather_object
from torch import distributed

from spectune.errors import SpectuneError, Stopped
from spectune.training.processes.stopping import own_work

T = TypeVar("T")
R = TypeVar("R")


def shared(items: Sequence[T], function: Callable[[T], R]) -> Iterator[R]:
    """Yield `function(item)` of all items in their order; process p of N computes the items p, p + N, ...

    All processes must have the same items. Results are sent as they are, so tensors must be on the CPU.

    Raises:
        SpectuneError: `function` raised it, on any process.
        Stopped: A signal arrived, on any process.
    """
    if not _are_several():
        yield from map(function, items)
        return
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    for start in range(0, len(items), processes):
        mine = [_tried(function, item) for item in items[start + rank : start + rank + 1]]
        for result, error in cast("list[tuple[R, SpectuneError | Stopped | None]]", gather_object(mine)):
            if error is not None:
                error.is_reported = rank != 0
                raise error
            yield result


def on_any_process(numbers: Iterable[int]) -> list[int]:
    """Return the numbers that at least one process passes, in ascending order."""
    found = list(numbers)
    return sorted(set(cast("list[int]", gather_object(found)) if _are_several() else found))


def on_every_process(function: Callable[[], None]) -> None:
    """Call `function` on each process.

    Raises:
        SpectuneError: `function` raised it, on any process.
    """
    for _ in shared(range(distributed.get_world_size() if _are_several() else 1), lambda _: function()):
        pass


def writes_files() -> bool:
    """Return whether this process writes what all processes of its host have."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _are_several() -> bool:
    # not accelerate's state, which reading would create with its defaults
    return distributed.is_available() and distributed.is_initialized()


def _tried(function: Callable[[T], R], item: T) -> tuple[R | None, SpectuneError | Stopped | None]:
    try:
        with own_work():
            return function(item), None
    except (SpectuneError, Stopped) as error:
        return None, error
