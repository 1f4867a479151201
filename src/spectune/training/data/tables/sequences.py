"""Sequences whose items are made when they are read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, TypeVar, overload

T_co = TypeVar("T_co", covariant=True)
S = TypeVar("S")


class LazySequence(Sequence[T_co]):
    """A sequence whose items are made when they are read. Subclasses define `__len__` and `item`."""

    def item(self, index: int) -> T_co:
        """Return the item at an index of 0..len-1."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> T_co: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T_co, ...]: ...
    def __getitem__(self, index: Any) -> Any:
        indices = range(len(self))[index]
        return tuple(map(self.item, indices)) if isinstance(indices, range) else self.item(indices)


class Chain(LazySequence[T_co]):
    """The items of some sequences, one sequence after the other."""

    def __init__(self, parts: Sequence[Sequence[T_co]]) -> None:
        self.parts = tuple(part for part in parts if len(part))
        self._ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def item(self, index: int) -> T_co:
        part = bisect_right(self._ends, index)
        return self.parts[part][index - self._ends[part]]


class Mapped(LazySequence[T_co]):
    """The results of a function for the items of a sequence."""

    def __init__(self, items: Sequence[S], function: Callable[[S], T_co]) -> None:
        self.items: Sequence[Any] = items
        self.function = function

    def __len__(self) -> int:
        return len(self.items)

    def item(self, index: int) -> T_co:
        return self.function(self.items[index])
