"""Many texts in two arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from spectune.training.data.tables.sequences import LazySequence

_ERRORS = "surrogateescape"  # file names on Linux need not be Unicode


@dataclass(frozen=True)
class Strings(LazySequence[str]):
    """Texts in two arrays, which can be mapped from a file. A text takes 8 bytes and its UTF-8."""

    data: NDArray[np.uint8]  # one text after the other
    ends: NDArray[np.int64]  # of each text in `data`

    @classmethod
    def of(cls, texts: Iterable[str]) -> Strings:
        """Return texts as arrays."""
        encoded = [text.encode("utf-8", _ERRORS) for text in texts]
        data = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        return cls(data, np.fromiter(accumulate(map(len, encoded)), dtype=np.int64, count=len(encoded)))

    def __len__(self) -> int:
        return len(self.ends)

    def item(self, index: int) -> str:
        begin = self.ends[index - 1] if index else 0
        return self.data[begin : self.ends[index]].tobytes().decode("utf-8", _ERRORS)

    def with_text(self) -> NDArray[np.int64]:
        """Return the indices of the texts that are not empty."""
        return np.flatnonzero(np.diff(self.ends, prepend=0))

    def is_sound(self) -> bool:
        """Return whether the arrays fit together."""
        ends = np.concatenate([[0], self.ends])
        return bool((np.diff(ends) >= 0).all()) and ends[-1] == len(self.data)
