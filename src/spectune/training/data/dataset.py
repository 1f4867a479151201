"""Batches of images: pixels or cached latents, masks, captions and size conditioning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from spectune.errors import InputError
from spectune.model.device import send
from spectune.training.data.buckets import Buckets, Placement, Size
from spectune.training.data.captions.draws import draw_caption
from spectune.training.data.color import ColorChange, draw_color
from spectune.training.data.images import alpha_of, load_image, open_image, render
from spectune.training.data.masks import open_mask, render_mask
from spectune.training.data.pictures.formats import UnusableImage
from spectune.training.data.plan import Draw
from spectune.training.data.tables.images import CaptionedImage, sizes_and_repeats
from spectune.training.data.tables.placements import Members, Placements
from spectune.training.data.tables.sequences import Chain
from spectune.training.recipe.sections.captions import CaptionSection
from spectune.training.recipe.sections.data import DataSection, MaskSource
from spectune.training.seeds import derived_random


@dataclass(frozen=True)
class View:
    """An image with a placement and a color. `variant` is the number of the view in the cache."""

    image: int  # index into the dataset
    placement: Placement
    color: ColorChange | None = None
    variant: int = 0

    @property
    def pixels_name(self) -> str:
        """Size, crop, orientation and color as text: views of an image with equal pixels have equal names.

        For example `1100x1024+38+0-1024x1024-mirrored`.
        """
        at = self.placement
        name = (
            f"{at.resized.width}x{at.resized.height}+{at.left}+{at.top}-{at.target.width}x{at.target.height}"
        )
        if at.flipped:
            name += "-mirrored"
        if self.color is not None:
            # hex: changes that differ in the last bit get different names
            name += "".join(f"-{v.hex()}" for v in (self.color.hue, self.color.saturation, self.color.gamma))
        return name


@dataclass(frozen=True)
class Batch:
    """Images of one size with their conditioning. Either `pixels` or `latents` is None."""

    pixels: Tensor | None  # (batch, 3, height, width) float32 in -1..1
    latents: Tensor | None  # (batch, channels, h, w) float32, scaled
    captions: tuple[str, ...]
    time_ids: Tensor  # (batch, 6) float32, because bfloat16 cannot hold sizes in pixels
    weights: Tensor  # (batch,) float32, loss weight of each image
    masks: Tensor | None  # (batch, 1, h, w) float32 in 0..1, loss weight of each latent; None: all 1
    views: tuple[View, ...]
    position: int

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """Return the batch on another device (called by accelerate, which decides about `non_blocking`)."""
        tensors = {"pixels": self.pixels, "latents": self.latents, "masks": self.masks}
        tensors |= {"time_ids": self.time_ids, "weights": self.weights}
        moved = {name: send(tensor, device) for name, tensor in tensors.items() if tensor is not None}
        return replace(self, **moved)


@dataclass(frozen=True)
class Variation:
    """The random variation between draws of an image. The defaults turn all of it off."""

    captions: CaptionSection = field(default_factory=CaptionSection)
    flip_probability: float = 0.0
    random_crop: bool = False
    color_probability: float = 0.0
    cached_variants: int = 1  # number of crops and colors of each orientation in the cache

    @classmethod
    def of(cls, data: DataSection) -> Self:
        """Return the variation of a recipe."""
        return cls(
            captions=data.caption,
            flip_probability=data.flip_probability,
            random_crop=data.random_crop,
            color_probability=data.color_probability,
            cached_variants=data.cache_variants,
        )

    @property
    def varies_views(self) -> bool:
        """Whether crops or colors are random."""
        return self.random_crop or self.color_probability > 0

    @property
    def flips(self) -> tuple[bool, ...]:
        """The orientations that can be drawn."""
        if self.flip_probability == 0:
            return (False,)
        return (True,) if self.flip_probability == 1 else (False, True)


class CachedLatents(Protocol):
    """The latents of the cached views of a run."""

    @property
    def in_memory(self) -> bool:
        """Whether few views are cached, so that their masks fit in memory too."""
        ...

    def of(self, view: View, number: int) -> Tensor:
        """Return the latents of a cached view, (channels, h, w) float32; `number` is that of the view."""
        ...


class Pictures(Dataset[Batch]):
    """The images of a run, each at every resolution. Indexing with a list of draws returns their batch.

    With `latents` set, draws use the views that `cached_view` returns. Masks are averaged over squares with
    the edge length `pixels_per_latent`.
    """

    def __init__(
        self,
        images: Sequence[CaptionedImage],
        buckets: Sequence[Buckets],
        variation: Variation,
        *,
        seed: int,
        masks: MaskSource = "none",
        pixels_per_latent: int = 8,
    ) -> None:
        """Assign each image to a training size in each of `buckets`, one for each resolution."""
        self.files = len(images)
        self.images = images if len(buckets) == 1 else Chain([images] * len(buckets))
        sizes, self.repeats = sizes_and_repeats(images)  # repeats of each file, int32
        self.placements = Placements(sizes, buckets)
        self.variation = variation
        self.seed = seed
        self.masks: MaskSource = masks
        self.pixels_per_latent = pixels_per_latent
        self.latents: CachedLatents | None = None
        self._cached_masks: dict[tuple[int, Placement], Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    def buckets(self) -> dict[Size, Members]:
        """Return the (image, repeats) of each size, the input of the batch plan."""
        return {
            target: Members(images, self.repeats[images % self.files])
            for target, images in self.placements.by_target().items()
        }

    def enlarged(self) -> int:
        """Return the number of files that are enlarged to a training size."""
        return int(self.placements.enlarged.reshape(-1, self.files).any(axis=0).sum())

    def pixels(self, view: View) -> Tensor:
        """Return the pixels of a view, float32 (3, height, width) in -1..1."""
        with self._readable(view.image) as path:
            return render(open_image(path), view.placement, view.color)

    def mask(self, view: View) -> Tensor:
        """Return the loss weight of each latent of a view, float32 (1, h, w) in 0..1."""
        image, mask = self.images[view.image], None
        if self.masks == "alpha":
            with self._readable(view.image) as path:
                mask = alpha_of(load_image(path))
        elif self.masks == "file" and image.mask is not None:
            mask = open_mask(image.mask, image.size)
        return render_mask(mask, view.placement, self.pixels_per_latent)

    @contextmanager
    def _readable(self, image: int) -> Iterator[Path]:
        path = self.images[image].path
        try:
            yield path
        except UnusableImage as error:
            raise InputError(
                f"{path} {error}",
                hint="restore or replace the file, and run the same command again",
            ) from error

    def cached_view(self, image: int, *, flipped: bool = False, variant: int = 0) -> View:
        """Return a view of an image for the cache.

        Its crop and color depend only on seed, file name, orientation and variant, not on other images.
        """
        if not self.variation.varies_views:
            return View(image, self.placements[image].varied(flipped=flipped), None, variant)
        name = self.images[image].path.name
        random = derived_random(self.seed, "view", name, flipped, variant)
        return replace(self._view(image, flipped, random), variant=variant)

    @property
    def views_per_image(self) -> int:
        """The number of cached views of an image."""
        return len(self.variation.flips) * self.variation.cached_variants

    def view_numbered(self, number: int) -> View:
        """Return a cached view. Those of an image have successive numbers, from its index on."""
        image, rest = divmod(number, self.views_per_image)
        flip, variant = divmod(rest, self.variation.cached_variants)
        return self.cached_view(image, flipped=self.variation.flips[flip], variant=variant)

    def number_of(self, view: View) -> int:
        """Return the number of a cached view."""
        flip = self.variation.flips.index(view.placement.flipped)
        return view.image * self.views_per_image + flip * self.variation.cached_variants + view.variant

    def __getitems__(self, draws: Sequence[Draw]) -> Batch:
        images = [self.images[draw.image] for draw in draws]
        random = [derived_random(self.seed, "draw", draw.epoch, draw.image, draw.repeat) for draw in draws]
        captions = tuple(
            draw_caption(image.text, self.variation.captions, choices)
            for image, choices in zip(images, random, strict=True)
        )
        views = tuple(
            self._drawn_view(draw.image, choices) for draw, choices in zip(draws, random, strict=True)
        )
        cached = self.latents is not None
        return Batch(
            pixels=None if cached else torch.stack([self.pixels(view) for view in views]),
            latents=torch.stack([self._cached_latents(view) for view in views]) if cached else None,
            captions=captions,
            time_ids=torch.tensor([view.placement.time_ids for view in views], dtype=torch.float32),
            weights=torch.tensor([image.weight for image in images], dtype=torch.float32),
            masks=None if self.masks == "none" else torch.stack([self._drawn_mask(view) for view in views]),
            views=views,
            position=draws[0].position,
        )

    def _drawn_view(self, image: int, random: Random) -> View:
        flipped = random.random() < self.variation.flip_probability
        if self.latents is None:
            return self._view(image, flipped, random)
        variants = self.variation.cached_variants
        variant = random.randrange(variants) if variants > 1 else 0
        return self.cached_view(image, flipped=flipped, variant=variant)

    def _view(self, image: int, flipped: bool, random: Random) -> View:
        crop = random if self.variation.random_crop else None
        placement = self.placements[image].varied(flipped=flipped, random=crop)
        return View(image, placement, draw_color(self.variation.color_probability, random))

    def _cached_latents(self, view: View) -> Tensor:
        assert self.latents is not None
        return self.latents.of(view, self.number_of(view))

    def _drawn_mask(self, view: View) -> Tensor:
        if self.latents is None or not self.latents.in_memory:
            return self.mask(view)
        key = (view.image, view.placement)
        if key not in self._cached_masks:
            self._cached_masks[key] = self.mask(view)
        return self._cached_masks[key]


def keep_batch(batch: Batch) -> Batch:
    """Return `batch` unchanged: a collate function for batches that the dataset has assembled."""
    return batch
