"""Masks: where in a picture the loss counts. White counts in full, black does not count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from spectune.errors import InputError
from spectune.training.data.buckets import Placement, Size
from spectune.training.data.images import UnusableImage, cut_out, open_image


def mask_file(image: Path, suffix: str) -> Path:
    """Return the path of the mask of a picture: `cat.mask.png` for `cat.webp`."""
    return image.with_name(image.stem + suffix)


def is_mask(path: Path, suffix: str) -> bool:
    """Return whether a file is a mask, by its name."""
    return path.name.lower().endswith(suffix.lower())


def open_mask(path: Path, picture: Size) -> Image.Image:
    """Read a mask as an 8-bit gray image, of any scale.

    Raises:
        InputError: The file cannot be read, or its aspect is not that of its picture.
    """
    try:
        mask = open_image(path).convert("L")
    except UnusableImage as error:
        raise InputError(
            f"the mask {path} {error}", hint="repair it, or remove it to train on all of the picture"
        ) from error
    size = Size(*mask.size)
    # Rounding moves the sides of a scaled copy by at most one pixel.
    if abs(size.width * picture.height - size.height * picture.width) > picture.width + picture.height:
        raise InputError(
            f"the mask {path} is {size.width}x{size.height}, its picture {picture.width}x{picture.height}: "
            "expected the same aspect",
            hint="save the mask in the size of the picture, or scaled",
        )
    return mask


def render_mask(mask: Image.Image | None, placement: Placement, pixels_per_latent: int) -> Tensor:
    """Return how much each latent counts, float32 (1, h, w) in 0..1; ones without a mask."""
    target = placement.target
    if mask is None:
        return torch.ones(1, target.height // pixels_per_latent, target.width // pixels_per_latent)
    # bilinear: LANCZOS would ring at the edges of a mask
    levels = torch.from_numpy(np.array(cut_out(mask, placement, Image.Resampling.BILINEAR)))  # uint8
    return avg_pool2d(levels[None].float(), pixels_per_latent) / 255
