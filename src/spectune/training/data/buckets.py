"""Bucket sizes, and the placement of an image in one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, order=True)
class Size:
    """Width and height in pixels."""

    width: int
    height: int

    @property
    def aspect(self) -> float:
        """Width divided by height."""
        return self.width / self.height


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
class Fit:
    """The training size of an image, and the size that the image is resized to before it is cropped."""

    target: Size
    resized: Size

    @property
    def area_lost(self) -> float:
        """The share of the image that a crop removes, in 0..1."""
        return 1 - self.target.width * self.target.height / (self.resized.width * self.resized.height)

    def centered(self, original: Size) -> Placement:
        """Return the placement of the image, cropped at the center."""
        return place(original, self.target, resized=self.resized)


@dataclass(frozen=True)
class Buckets:
    """The training sizes of one resolution.

    With `kept_area`, as with kohya's bucket_no_upscale, images of at most so many pixels keep their size,
    and larger ones shrink to it. Both sides are then cropped to multiples of `step`. `sizes` are not used.
    """

    sizes: tuple[Size, ...]
    step: int = 64
    kept_area: int | None = None

    def fit(self, original: Size) -> Fit:
        """Return the training size of an image."""
        if self.kept_area is None:
            target = nearest_bucket(original, self.sizes)
            return Fit(target, _covering(original, target))
        resized = original
        if original.width * original.height > self.kept_area:
            resized = self._shrunk(original)
        target = Size(self._steps(resized.width), self._steps(resized.height))
        if target.width > resized.width or target.height > resized.height:  # a side is shorter than a step
            resized = _covering(original, target)
        return Fit(target, resized)

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


@dataclass(frozen=True)
class Placement:
    """The resizing, cropping and mirroring that fit an image to a training size, in pixels."""

    original: Size
    resized: Size
    target: Size
    left: int  # of the crop, in the resized image before it is mirrored
    top: int
    flipped: bool

    @property
    def cropped_share(self) -> float:
        """Return the share of the image's area that is cropped away."""
        return Fit(self.target, self.resized).area_lost

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


def place(
    original: Size,
    target: Size,
    *,
    resized: Size | None = None,
    flipped: bool = False,
    random: Random | None = None,
) -> Placement:
    """Return the placement of an image in a bucket, cropped at the center, or randomly with `random`.

    Without `resized`, the image is resized to cover `target`.
    """
    resized = resized or _covering(original, target)
    free_x, free_y = resized.width - target.width, resized.height - target.height
    left, top = (
        (free_x // 2, free_y // 2)
        if random is None
        else (random.randint(0, free_x), random.randint(0, free_y))
    )
    return Placement(original=original, resized=resized, target=target, left=left, top=top, flipped=flipped)


def _covering(original: Size, target: Size) -> Size:
    """Return the smallest size with the aspect of an image that covers `target`."""
    scale = max(target.width / original.width, target.height / original.height)
    return Size(
        max(target.width, round(original.width * scale)), max(target.height, round(original.height * scale))
    )
