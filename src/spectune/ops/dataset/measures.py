"""Measure pictures while they are decoded: sharpness, and a hash that finds near duplicates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from spectune.files.pipeline import Progress, report_progress
from spectune.ops.dataset.near_duplicates import perceptual_hash
from spectune.training.data.buckets import Buckets, Size

TILES = 4  # per side


@dataclass(frozen=True)
class Measured:
    """The results for one picture."""

    sharpness: float
    hash: int | None  # 64 bits; None if imagehash is not installed


class Measurer:
    """Measures each picture of a scan. Only the results are kept."""

    def __init__(self, buckets: Buckets, files: int, progress: Progress | None) -> None:
        """Measure at the training sizes of `buckets`; `files` is the total for `progress`."""
        self.results: dict[Path, Measured] = {}
        self._buckets, self._files, self._progress = buckets, files, progress
        self._lock = Lock()

    def __call__(self, path: Path, image: Image.Image) -> None:
        """Measure one picture, on the thread that decoded it."""
        gray = at_training_size(image.convert("L"), self._buckets)
        measured = Measured(sharpness(np.asarray(gray)), perceptual_hash(gray))
        with self._lock:
            self.results[path] = measured
            report_progress(self._progress, len(self.results), self._files, path.name)


def at_training_size(image: Image.Image, buckets: Buckets) -> Image.Image:
    """Return the image reduced to its training size; a smaller image is returned unchanged."""
    original = Size(*image.size)
    resized = buckets.fit(original).resized
    if resized.width >= original.width:
        return image
    # reducing_gap: average whole blocks of a large image first, which is much faster
    return image.resize((resized.width, resized.height), Image.Resampling.LANCZOS, reducing_gap=2.0)


def sharpness(levels: NDArray[np.uint8]) -> float:
    """Return the variance of the Laplacian of gray levels, in the sharpest of 4 x 4 tiles.

    A sharp subject before a blurred background thus counts as sharp.
    """
    wide = levels.astype(np.int16)
    laplacian = wide[1:-1, :-2] + wide[1:-1, 2:] + wide[:-2, 1:-1] + wide[2:, 1:-1] - 4 * wide[1:-1, 1:-1]
    tiles = [tile for row in np.array_split(laplacian, TILES) for tile in np.array_split(row, TILES, axis=1)]
    return round(max(float(np.var(tile)) if tile.size else 0.0 for tile in tiles), 1)
