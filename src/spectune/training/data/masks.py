"""Where in a picture the loss counts: its alpha channel, or a grey image beside it; white counts fully."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from spectune.errors import InputError
from spectune.training.data.buckets import Placement, Size
from spectune.training.data.images import UnusableImage, cut_out, open_image

MaskSource = Literal["none", "alpha", "file"]
MASK_SUFFIX = ".mask.png"


def mask_file(image: Path, suffix: str) -> Path:
    """Where the mask of a picture lies: `cat.mask.png` beside `cat.webp`."""
    return image.with_name(image.stem + suffix)


def is_mask(path: Path, suffix: str) -> bool:
    """Whether a file is a mask by its name."""
    return path.name.lower().endswith(suffix.lower())


def open_mask(path: Path, picture: Size) -> Image.Image:
    """The mask in `path` as an 8-bit grey image, of any scale.

    Raises InputError when it cannot be read or has another aspect than its picture.
    """
    try:
        mask = open_image(path).convert("L")
    except UnusableImage as error:
        raise InputError(
            f"the mask {path} {error}", hint="mend it, or remove it to train on all of the picture"
        ) from error
    size = Size(*mask.size)
    # A scaled copy of the picture is off by at most a pixel in width and height.
    if abs(size.width * picture.height - size.height * picture.width) > picture.width + picture.height:
        raise InputError(
            f"the mask {path} is {size.width}x{size.height}, of another aspect than its picture, "
            f"which is {picture.width}x{picture.height}",
            hint="save the mask in the size of the picture, or scaled",
        )
    return mask


def render_mask(mask: Image.Image | None, placement: Placement, pixels_per_latent: int) -> Tensor:
    """The share of each latent that counts, float32 (1, h, w) in 0..1; all of it without a mask."""
    target = placement.target
    if mask is None:
        return torch.ones(1, target.height // pixels_per_latent, target.width // pixels_per_latent)
    # bilinear: LANCZOS would ring at the edges of a mask
    levels = torch.from_numpy(np.array(cut_out(mask, placement, Image.Resampling.BILINEAR)))  # uint8
    return avg_pool2d(levels[None].float(), pixels_per_latent) / 255
