"""Read image files as upright 8-bit RGB images, and turn them into tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from spectune.training.data.buckets import Placement
from spectune.training.data.color import ColorChange, recolor

SUFFIXES = frozenset({".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


class UnusableImage(Exception):
    """An image that cannot be trained on; the message gives the reason."""


def open_image(path: Path) -> Image.Image:
    """Read an image as RGB, rotated by its EXIF data, with white behind transparent pixels.

    Raises:
        UnusableImage: The file is damaged, truncated or animated.
    """
    return as_rgb(load_image(path))


def load_image(path: Path) -> Image.Image:
    """Read the only image in a file, rotated by its EXIF data, in the mode of the file.

    Raises:
        UnusableImage: The file is damaged, truncated or animated.
    """
    with _reasons(), Image.open(path) as image:
        frames = getattr(image, "n_frames", 1)
        # MPO is a JPEG with more frames: the first is the image, others are previews or a second view
        if frames > 1 and image.format != "MPO":
            raise UnusableImage(f"is animated ({frames} frames)")
        image.load()
        return ImageOps.exif_transpose(image)


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn the errors of Pillow into UnusableImage."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise UnusableImage("is not an image that Pillow can read") from error
    # Pillow's decoders raise any of these for damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UnusableImage(f"is damaged: {error}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image to RGB, with white behind transparent pixels.

    Raises:
        UnusableImage: The levels are floating-point numbers of unknown range.
    """
    if image.mode == "F":
        raise UnusableImage("holds floating-point levels, whose range is not known")
    with _reasons():
        if image.mode.startswith("I"):
            return _eight_bits(image).convert("RGB")
        if has_alpha(image):
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return image.convert("RGB")


def alpha_of(image: Image.Image) -> Image.Image | None:
    """Return the alpha channel of a loaded image as an 8-bit gray image, or None if it has none."""
    return image.convert("RGBA").getchannel("A") if has_alpha(image) else None


def has_alpha(image: Image.Image) -> bool:
    """Return whether a loaded image has transparency."""
    # Pillow cannot convert 16-bit gray to RGBA
    return not image.mode.startswith("I") and (
        "transparency" in image.info or image.mode in ("LA", "PA", "RGBA", "RGBa", "La")
    )


def _eight_bits(image: Image.Image) -> Image.Image:
    # 16-bit gray: Pillow's own conversion clips at 255 instead of scaling.
    return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))


def cut_out(image: Image.Image, placement: Placement, resample: Image.Resampling) -> Image.Image:
    """Return the image resized, cropped and mirrored."""
    size, target = placement.resized, placement.target
    if image.size != (size.width, size.height):
        image = image.resize((size.width, size.height), resample)
    image = image.crop(
        (placement.left, placement.top, placement.left + target.width, placement.top + target.height)
    )
    return ImageOps.mirror(image) if placement.flipped else image


def render(image: Image.Image, placement: Placement, color: ColorChange | None = None) -> Tensor:
    """Return the placed and recolored image, float32 (3, height, width) in -1..1."""
    levels = np.array(cut_out(image, placement, Image.Resampling.LANCZOS))  # (height, width, 3), uint8
    if color is not None:
        planes = levels.transpose(2, 0, 1).astype(np.float32, order="C") / np.float32(255)
        return torch.from_numpy(recolor(planes, color)).mul_(2).sub_(1)
    return torch.from_numpy(levels).permute(2, 0, 1).float().div_(127.5).sub_(1)
