"""Masks: the loss weight of each part of an image, from 0 for black to 1 for white."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from spectune.errors import InputError
from spectune.training.data.buckets import Placement, Size
from spectune.training.data.images import cut_out, open_image
from spectune.training.data.pictures.formats import UnusableImage


def mask_file(image: Path, suffix: str) -> Path:
    """Return the path of the mask of an image: `cat.mask.png` for `cat.webp`."""
    return image.with_name(image.stem + suffix)


def is_mask(path: Path, suffix: str) -> bool:
    """Return whether the name of a file is that of a mask."""
    return path.name.lower().endswith(suffix.lower())


def open_mask(path: Path, image: Size) -> Image.Image:
    """Read a mask as an 8-bit gray image. Its size may differ from that of its image, its aspect may not.

    Raises:
        InputError: The file cannot be read, or its aspect differs from that of its image.
    """
    try:
        mask = open_image(path).convert("L")
    except UnusableImage as error:
        raise InputError(
            f"the mask {path} {error}", hint="repair it, or remove it to train on the complete image"
        ) from error
    size = Size(*mask.size)
    # Scaling changes the sides by at most one pixel of rounding.
    if abs(size.width * image.height - size.height * image.width) > image.width + image.height:
        raise InputError(
            f"the mask {path} is {size.width}x{size.height}, its image {image.width}x{image.height}: "
            "expected the same aspect",
            hint="save the mask in the size of its image, or in a scaled size",
        )
    return mask


def render_mask(mask: Image.Image | None, placement: Placement, pixels_per_latent: int) -> Tensor:
    """Return the loss weight of each latent, float32 (1, h, w) in 0..1; all ones without a mask."""
    target = placement.target
    if mask is None:
        return torch.ones(1, target.height // pixels_per_latent, target.width // pixels_per_latent)
    # bilinear: LANCZOS would ring at the edges of a mask
    levels = torch.from_numpy(np.array(cut_out(mask, placement, Image.Resampling.BILINEAR)))  # uint8
    return avg_pool2d(levels[None].float(), pixels_per_latent) / 255
