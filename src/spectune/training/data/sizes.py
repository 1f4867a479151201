"""The training sizes of a recipe. This module loads no network library: `dataset` and `new` use it."""

from __future__ import annotations

from spectune.training.data.buckets import Buckets, Size, bucket_sizes
from spectune.training.recipe.sections.data import DEFAULT_STEP_PX, BucketSection, DataSection


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
