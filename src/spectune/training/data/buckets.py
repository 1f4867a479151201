"""Bucket sizes, and the placement of an image in one of them.

This module loads no network library: `dataset` and `new` use it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random

from spectune.training.recipe.sections.data import DEFAULT_STEP_PX, BucketSection, DataSection


@dataclass(frozen=True, order=True)
class Size:
    """Width and height in pixels."""

    width: int
    height: int

    @property
    def aspect(self) -> float:
        """Width divided by height."""
        return self.width / self.height

    def __iter__(self) -> Iterator[int]:
        return iter((self.width, self.height))


def bucket_sizes(resolution: int, *, minimum: int, maximum: int, step: int) -> tuple[Size, ...]:
    """Return sizes of at most `resolution`² pixels whose sides are multiples of `step` in minimum..maximum.

    Resolution 1024 with sides 768..1280 in steps of 64 gives 768x1280, 832x1216, 896x1152, 960x1088,
    1024x1024 and their transposes, like kohya's make_bucket_resolutions.
    """
    side = resolution // step * step
    minimum, maximum = -(-minimum // step) * step, maximum // step * step
    sizes = {Size(side, side)}
    for width in range(minimum, maximum + 1, step):
        height = min(maximum, resolution**2 // width // step * step)
        if height >= minimum:
            sizes |= {Size(width, height), Size(height, width)}
    return tuple(sorted(sizes))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """Return the bucket with the nearest aspect, by the ratio of aspects: a transpose gives a transpose."""
    return min(buckets, key=lambda bucket: (abs(math.log(bucket.aspect / size.aspect)), bucket))


@dataclass(frozen=True)
class Placement:
    """The resizing, cropping and mirroring that fit an image to a training size, in pixels."""

    original: Size
    resized: Size
    target: Size
    left: int  # of the crop, in the resized image before it is mirrored
    top: int
    flipped: bool = False

    @property
    def cropped_share(self) -> float:
        """The share of the image's area that is cropped away, in 0..1."""
        return 1 - self.target.width * self.target.height / (self.resized.width * self.resized.height)

    def varied(self, *, flipped: bool, random: Random | None = None) -> Placement:
        """Return the placement, mirrored if `flipped`, and with `random` cropped at a random position."""
        if random is None:
            return replace(self, flipped=flipped)
        left = random.randint(0, self.resized.width - self.target.width)
        top = random.randint(0, self.resized.height - self.target.height)
        return replace(self, left=left, top=top, flipped=flipped)

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's size conditioning: original height, width; crop top, left; target height, width.

        In a mirrored image, the left margin of the crop is measured after the mirroring.
        """
        left = self.resized.width - self.left - self.target.width if self.flipped else self.left
        return (
            self.original.height,
            self.original.width,
            self.top,
            left,
            self.target.height,
            self.target.width,
        )


def covering(original: Size, target: Size) -> Placement:
    """Return the placement of an image in the smallest size with its aspect that covers `target`."""
    scale = max(target.width / original.width, target.height / original.height)
    resized = Size(
        max(target.width, round(original.width * scale)), max(target.height, round(original.height * scale))
    )
    return _centered(original, resized, target)


def _centered(original: Size, resized: Size, target: Size) -> Placement:
    left, top = (resized.width - target.width) // 2, (resized.height - target.height) // 2
    return Placement(original, resized, target, left, top)


@dataclass(frozen=True)
class Buckets:
    """The training sizes of one resolution.

    With `kept_area`, as with kohya's bucket_no_upscale, images of at most so many pixels keep their size,
    and larger ones shrink to it. Both sides are then cropped to multiples of `step`. `sizes` are not used.
    """

    sizes: tuple[Size, ...]
    step: int = 64
    kept_area: int | None = None

    def fit(self, original: Size) -> Placement:
        """Return the placement of an image in its training size, cropped at the center."""
        if self.kept_area is None:
            return covering(original, nearest_bucket(original, self._near(original.aspect)))
        resized = original
        if original.width * original.height > self.kept_area:
            resized = self._shrunk(original)
        target = Size(self._steps(resized.width), self._steps(resized.height))
        if target.width > resized.width or target.height > resized.height:  # a side is shorter than a step
            return covering(original, target)
        return _centered(original, resized, target)

    def _near(self, aspect: float) -> Sequence[Size]:
        """Return the sizes with the next smaller and the next larger aspect."""
        position = bisect_left(self._by_aspect, aspect, key=lambda size: size.aspect)
        return self._by_aspect[max(0, position - 1) : position + 1]

    @cached_property
    def _by_aspect(self) -> list[Size]:
        """The sizes by aspect, of each aspect the smallest."""
        smallest = {size.aspect: size for size in sorted(self.sizes, reverse=True)}
        return [smallest[aspect] for aspect in sorted(smallest)]

    def _shrunk(self, original: Size) -> Size:
        """Return a size of about `kept_area` pixels with the aspect of an image.

        One side is a multiple of `step`: the one whose crop is nearer to the aspect of the image.
        """
        assert self.kept_area is not None
        aspect = original.aspect
        width = self._steps(math.sqrt(self.kept_area * aspect) + 0.5)
        height = self._steps(math.sqrt(self.kept_area / aspect) + 0.5)
        by_width = abs(width / self._steps(width / aspect + 0.5) - aspect)
        by_height = abs(self._steps(height * aspect + 0.5) / height - aspect)
        if by_width < by_height:
            return Size(width, int(width / aspect + 0.5))
        return Size(int(height * aspect + 0.5), height)

    def _steps(self, side: float) -> int:
        return max(1, int(side) // self.step) * self.step


def training_sizes(data: DataSection) -> tuple[Size, ...]:
    """Return all training sizes in pixels; with `no_upscale`, the largest square of each resolution."""
    return tuple(size for buckets in training_buckets(data) for size in buckets.sizes)


def training_buckets(data: DataSection) -> tuple[Buckets, ...]:
    """Return the training sizes of each resolution of a recipe with its defaults filled in."""
    return tuple(_buckets(resolution, data.bucket) for resolution in data.resolutions)


def _buckets(resolution: int, bucket: BucketSection) -> Buckets:
    if not bucket.enabled:
        return Buckets((Size(resolution, resolution),))
    step = bucket.step_px or DEFAULT_STEP_PX
    if bucket.no_upscale:
        side = resolution // step * step
        return Buckets((Size(side, side),), step, kept_area=resolution**2)
    minimum, maximum = bucket.sides(resolution)
    return Buckets(bucket_sizes(resolution, minimum=minimum, maximum=maximum, step=step), step)
