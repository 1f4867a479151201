"""Find pictures that look almost the same, by the distance of their perceptual hashes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Of 64. For a photo, scaling and JPEG change no bit, a crop of 1 % at each side changes 2, of 2 % 4.
NEAR_BITS = 4
_BLOCK = 1024  # rows of the matrix of distances that are in memory at once


@cache
def _imagehash() -> ModuleType | None:
    try:
        import imagehash
    except ImportError:
        return None
    return imagehash


def perceptual_hash(gray: Image.Image) -> int | None:
    """Return the 64 bits of imagehash's phash, which scaling and compression hardly change."""
    module = _imagehash()
    if module is None:
        return None
    bits = module.phash(gray).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_groups(hashes: Sequence[int]) -> list[list[int]]:
    """Return the groups of indices whose hashes are connected by distances of at most NEAR_BITS."""
    members: dict[int, list[int]] = defaultdict(list)
    for index, value in enumerate(hashes):
        members[value].append(index)
    different = list(members)
    raw = np.array(different, dtype=">u8").view(np.uint8).reshape(-1, 8)
    # +1 and -1: a product of two rows is 64 minus twice their distance
    signs = np.unpackbits(raw, axis=1).astype(np.float32) * 2 - 1
    groups = (
        sorted(index for row in rows for index in members[different[row]]) for rows in _connected(signs)
    )
    return sorted(group for group in groups if len(group) > 1)


def _connected(signs: NDArray[np.float32]) -> Iterator[list[int]]:
    """Yield the connected rows. Rows without a near one, which are most, cost only a block of products."""
    limit = 64 - 2 * NEAR_BITS
    free = np.ones(len(signs), dtype=bool)
    for start in range(0, len(signs), _BLOCK):
        near = (signs[start : start + _BLOCK] @ signs.T >= limit).sum(axis=1) > 1
        for row in start + np.arange(len(near)):
            if not near[row - start]:
                yield [int(row)]
            elif free[row]:
                group: list[int] = []
                waiting = [int(row)]
                free[row] = False
                while waiting:
                    group.append(waiting.pop())
                    found = np.flatnonzero((signs @ signs[group[-1]] >= limit) & free)
                    free[found] = False
                    waiting += found.tolist()
                yield group
