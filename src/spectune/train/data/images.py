"""Image files as they are meant to be seen: upright, RGB, 8 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from spectune.train.data.buckets import Placement

SUFFIXES = frozenset({".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


class UnusableImage(Exception):
    """An image that cannot be trained on; the message says why."""


def open_image(path: Path) -> Image.Image:
    """The picture in `path`: turned as its EXIF data says, on white where it is transparent, RGB.

    Raises UnusableImage for files that are broken, cut short or animated.
    """
    try:
        with Image.open(path) as image:
            frames = getattr(image, "n_frames", 1)
            # MPO: a JPEG whose further frames are previews or the other eye's view; the first is the picture
            if frames > 1 and image.format != "MPO":
                raise UnusableImage(f"is animated ({frames} frames)")
            image.load()
            return _as_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise UnusableImage("is not an image that Pillow can read") from error
    # Pillow's decoders report damage by any of these.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UnusableImage(f"is damaged: {error}") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling.
        return Image.fromarray(
            (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        ).convert("RGB")
    if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA", "RGBa", "La"):
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("RGB")


def render(image: Image.Image, placement: Placement) -> Tensor:
    """The placed picture, float32 (3, height, width) in -1..1."""
    size, target = placement.resized, placement.target
    if image.size != (size.width, size.height):
        image = image.resize((size.width, size.height), Image.Resampling.LANCZOS)
    image = image.crop(
        (placement.left, placement.top, placement.left + target.width, placement.top + target.height)
    )
    if placement.flipped:
        image = ImageOps.mirror(image)
    levels = torch.from_numpy(np.array(image))  # (height, width, 3), uint8
    return levels.permute(2, 0, 1).float().div_(127.5).sub_(1)
