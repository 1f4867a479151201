"""Sequences that are made of others without a copy."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, TypeVar, overload

T_co = TypeVar("T_co", covariant=True)
S = TypeVar("S")


class Chain(Sequence[T_co]):
    """The items of some sequences, one sequence after the other."""

    def __init__(self, parts: Sequence[Sequence[T_co]]) -> None:
        self.parts = tuple(part for part in parts if len(part))
        self._ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> T_co: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T_co, ...]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[one] for one in range(len(self))[index])
        index = range(len(self))[index]
        part = bisect_right(self._ends, index)
        return self.parts[part][index - self._ends[part]]


class Mapped(Sequence[T_co]):
    """The results of a function for the items of a sequence, called when they are read."""

    def __init__(self, items: Sequence[S], function: Callable[[S], T_co]) -> None:
        self.items: Sequence[Any] = items
        self.function = function

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> T_co: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T_co, ...]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(map(self.function, self.items[index]))
        return self.function(self.items[index])
