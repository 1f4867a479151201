"""The placements of many images, in arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spectune.training.data.buckets import Buckets, Placement, Size
from spectune.training.data.tables.sequences import LazySequence

Ints = NDArray[np.int32]


class Placements(LazySequence[Placement]):
    """How each image is scaled and cropped to its training size: at the center, and not mirrored.

    A run may have several resolutions. First come the placements of all images at the first resolution, then
    those at the second. Images of one size share a placement, so an image takes 4 bytes for each resolution.
    """

    def __init__(self, sizes: Ints, buckets: Sequence[Buckets]) -> None:
        """Place images of `sizes`, (images, 2) with width and height in pixels."""
        keys = sizes[:, 0].astype(np.int64) << 32 | sizes[:, 1]
        different, kind_of = np.unique(keys, return_inverse=True)
        originals = [Size(int(key >> 32), int(key & 0xFFFFFFFF)) for key in different]
        placed = [fitting.fit(original) for fitting in buckets for original in originals]
        # width and height of original, resized and target; left, top
        self._kinds = np.array([_row(one) for one in placed], dtype=np.int32).reshape(-1, 8)
        # of each image: images with equal numbers have equal placements
        self.kind_of = np.concatenate(
            [kind_of.astype(np.int32) + number * len(different) for number in range(len(buckets))]
        )

    def __len__(self) -> int:
        return len(self.kind_of)

    def item(self, index: int) -> Placement:
        numbers = self._kinds[self.kind_of[index]].tolist()
        original, resized, target = (Size(*numbers[start : start + 2]) for start in (0, 2, 4))
        return Placement(original, resized, target, *numbers[6:])

    @property
    def cropped_shares(self) -> NDArray[np.float64]:
        """The share of the area of each image that is cropped away, in 0..1."""
        resized, target = (self._kinds[:, start : start + 2].astype(np.float64) for start in (2, 4))
        return (1 - target.prod(axis=1) / resized.prod(axis=1))[self.kind_of]

    @property
    def enlarged(self) -> NDArray[np.bool_]:
        """Whether each image is enlarged to its training size."""
        return np.any(self._kinds[:, 0:2] < self._kinds[:, 2:4], axis=1)[self.kind_of]

    def digest(self) -> str:
        """Return a hash of all placements, in their order."""
        return hashlib.sha256(self._kinds.tobytes() + self.kind_of.tobytes()).hexdigest()

    def by_target(self) -> dict[Size, Ints]:
        """Return the indices of the images of each training size, in order of the first image."""
        targets, of_kind = np.unique(self._kinds[:, 4:6], axis=0, return_inverse=True)
        target_of = of_kind.reshape(-1).astype(np.int32)[self.kind_of]
        order = np.argsort(target_of, kind="stable").astype(np.int32)
        parts = np.split(order, np.cumsum(np.bincount(target_of, minlength=len(targets)))[:-1])
        found = [(Size(*target), part) for target, part in zip(targets.tolist(), parts, strict=True)]
        return dict(sorted(found, key=lambda one: int(one[1][0])))


@dataclass(frozen=True)
class Members(LazySequence[tuple[int, int]]):
    """The (image, repeats) of one training size."""

    images: Ints
    repeats: Ints

    def __len__(self) -> int:
        return len(self.images)

    def item(self, index: int) -> tuple[int, int]:
        return int(self.images[index]), int(self.repeats[index])

    @property
    def draws(self) -> int:
        """The number of draws in an epoch."""
        return int(self.repeats.sum(dtype=np.int64))


def _row(at: Placement) -> tuple[int, ...]:
    sides = (side for size in (at.original, at.resized, at.target) for side in (size.width, size.height))
    return (*sides, at.left, at.top)
