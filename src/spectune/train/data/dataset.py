"""Drawn images as batches: pixels or cached latents, captions and size conditioning."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from spectune.errors import InputError
from spectune.train.data.buckets import Placement, Size, nearest_bucket, place
from spectune.train.data.captions import CaptionRules, draw_caption
from spectune.train.data.folders import CaptionedImage
from spectune.train.data.images import UnusableImage, open_image, render
from spectune.train.data.plan import Draw
from spectune.train.seeds import derived_random

CacheKey = tuple[int, bool]  # image, flipped


@dataclass(frozen=True)
class Batch:
    """Pictures of one size with what the model is told of them; either pixels or latents are there."""

    pixels: Tensor | None  # (batch, 3, height, width) float32 in -1..1
    latents: Tensor | None  # (batch, channels, h, w) float32, scaled
    captions: tuple[str, ...]
    time_ids: Tensor  # (batch, 6) float32: 16 bits cannot hold sizes in pixels
    position: int

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """The batch on another device; accelerate calls it."""
        move = lambda tensor: None if tensor is None else tensor.to(device, non_blocking=non_blocking)  # noqa: E731
        return replace(
            self, pixels=move(self.pixels), latents=move(self.latents), time_ids=move(self.time_ids)
        )


@dataclass(frozen=True)
class Variation:
    """What differs from draw to draw."""

    captions: CaptionRules = field(default_factory=CaptionRules)
    flip_probability: float = 0.0
    random_crop: bool = False

    @property
    def flips(self) -> tuple[bool, ...]:
        """The orientations that can be drawn."""
        if self.flip_probability == 0:
            return (False,)
        return (True,) if self.flip_probability == 1 else (False, True)


class Pictures(Dataset[Batch]):
    """The images of a run; asked for the draws of a batch at once, it answers with the batch."""

    def __init__(
        self, images: Sequence[CaptionedImage], sizes: Sequence[Size], variation: Variation, *, seed: int
    ) -> None:
        """`sizes` are the sizes in pixels that images are trained at."""
        self.images = tuple(images)
        self.targets = tuple(nearest_bucket(image.size, sizes) for image in images)
        self.variation = variation
        self.seed = seed
        self.latents: Mapping[CacheKey, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def buckets(self) -> dict[Size, list[tuple[int, int]]]:
        """Size -> (image, repeats), as the batch plan takes it."""
        found: dict[Size, list[tuple[int, int]]] = defaultdict(list)
        for index, (image, target) in enumerate(zip(self.images, self.targets, strict=True)):
            found[target].append((index, image.repeats))
        return dict(found)

    def enlarged(self) -> list[CaptionedImage]:
        """The images smaller than the size they are trained at."""
        return [
            image
            for image, target in zip(self.images, self.targets, strict=True)
            if image.size.width < target.width or image.size.height < target.height
        ]

    def pixels(self, image: int, placement: Placement) -> Tensor:
        """One placed picture, float32 (3, height, width) in -1..1."""
        path = self.images[image].path
        try:
            return render(open_image(path), placement)
        except UnusableImage as error:
            raise InputError(f"{path} {error}", hint="it was readable when the run started") from error

    def centred(self, image: int, *, flipped: bool = False) -> Placement:
        """The placement of an image when crops are fixed."""
        return place(self.images[image].size, self.targets[image], flipped=flipped)

    def __getitems__(self, draws: Sequence[Draw]) -> Batch:
        random = [derived_random(self.seed, "draw", draw.epoch, draw.image, draw.repeat) for draw in draws]
        captions = tuple(
            draw_caption(self.images[draw.image].caption, self.variation.captions, own)
            for draw, own in zip(draws, random, strict=True)
        )
        placements = [self._placed(draw.image, own) for draw, own in zip(draws, random, strict=True)]
        drawn = list(zip((draw.image for draw in draws), placements, strict=True))
        cached = self.latents
        return Batch(
            pixels=None if cached is not None else torch.stack([self.pixels(*item) for item in drawn]),
            latents=None if cached is None else torch.stack([cached[image, p.flipped] for image, p in drawn]),
            captions=captions,
            time_ids=torch.tensor([placement.time_ids for placement in placements], dtype=torch.float32),
            position=draws[0].position,
        )

    def _placed(self, image: int, random: Random) -> Placement:
        flipped = random.random() < self.variation.flip_probability
        crop = random if self.variation.random_crop else None
        return place(self.images[image].size, self.targets[image], flipped=flipped, random=crop)


def as_it_is(batch: Batch) -> Batch:
    """The collate function of batches that the data set has already put together."""
    return batch
