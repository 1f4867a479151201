"""Keys of 16 bytes, and a table that finds their rows without one Python object per row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

KEY_BYTES = 16
Keys = NDArray[np.uint8]  # (rows, 16)


def key_of(text: str) -> bytes:
    """Return a hash of a text, 16 bytes: 13 million of them are all different but for a chance of 1e-24."""
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=KEY_BYTES).digest()


def as_keys(keys: Iterable[bytes]) -> Keys:
    """Return keys of 16 bytes as an array, (rows, 16)."""
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)


class RowsByKey:
    """The rows of keys, found by binary search. It takes 32 bytes per key."""

    def __init__(self, keys: Keys) -> None:
        first, second = _words(keys)
        self._order = np.lexsort((second, first))  # stable: of equal keys, the first row is found
        self._first, self._second = first[self._order], second[self._order]

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """Return the row of each key, (keys,), and -1 for keys that are not in the table."""
        if not len(self._order):
            return np.full(len(keys), -1)
        first, second = _words(keys)
        at = np.searchsorted(self._first, first).clip(max=len(self._order) - 1)
        found = (self._first[at] == first) & (self._second[at] == second)
        return np.where(found, self._order[at], -1)


def _words(keys: Keys) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    words = np.ascontiguousarray(keys).view(np.uint64)
    return words[:, 0].copy(), words[:, 1].copy()
