"""Image files as they are meant to be seen: upright, RGB, 8 bits."""

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
    """An image that cannot be trained on; the message says why."""


def open_image(path: Path) -> Image.Image:
    """The picture in `path`: turned as its EXIF data says, on white where it is transparent, RGB.

    Raises UnusableImage for files that are broken, cut short or animated.
    """
    return as_rgb(load_image(path))


def load_image(path: Path) -> Image.Image:
    """The first and only picture in `path`, turned as its EXIF data says, in the mode of its file.

    Raises UnusableImage for files that are broken, cut short or animated.
    """
    with _reasons(), Image.open(path) as image:
        frames = getattr(image, "n_frames", 1)
        # MPO: a JPEG whose further frames are previews or the other eye's view; the first is the picture
        if frames > 1 and image.format != "MPO":
            raise UnusableImage(f"is animated ({frames} frames)")
        image.load()
        return ImageOps.exif_transpose(image)


@contextmanager
def _reasons() -> Iterator[None]:
    """Within, what Pillow raises for a file becomes UnusableImage."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise UnusableImage("is not an image that Pillow can read") from error
    # Pillow's decoders report damage by any of these.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UnusableImage(f"is damaged: {error}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """A loaded picture in RGB, on white where it is transparent.

    Raises UnusableImage for modes that have no such reading.
    """
    if image.mode == "F":
        raise UnusableImage("holds floating-point levels, whose range is not known")
    with _reasons():
        if image.mode.startswith("I"):
            return _eight_bits(image).convert("RGB")
        if has_alpha(image):
            seen = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
        return image.convert("RGB")


def alpha_of(image: Image.Image) -> Image.Image | None:
    """The alpha channel of a loaded picture as an 8-bit grey image, None when it has none."""
    return image.convert("RGBA").getchannel("A") if has_alpha(image) else None


def has_alpha(image: Image.Image) -> bool:
    """Whether a loaded picture says how opaque its pixels are."""
    # 16-bit grey has no way to RGBA in Pillow
    return not image.mode.startswith("I") and (
        "transparency" in image.info or image.mode in ("LA", "PA", "RGBA", "RGBa", "La")
    )


def _eight_bits(image: Image.Image) -> Image.Image:
    # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling.
    return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))


def cut_out(image: Image.Image, placement: Placement, resample: Image.Resampling) -> Image.Image:
    """The image resized, cropped and mirrored."""
    size, target = placement.resized, placement.target
    if image.size != (size.width, size.height):
        image = image.resize((size.width, size.height), resample)
    image = image.crop(
        (placement.left, placement.top, placement.left + target.width, placement.top + target.height)
    )
    return ImageOps.mirror(image) if placement.flipped else image


def render(image: Image.Image, placement: Placement, color: ColorChange | None = None) -> Tensor:
    """The placed picture in changed colours, float32 (3, height, width) in -1..1."""
    levels = np.array(cut_out(image, placement, Image.Resampling.LANCZOS))  # (height, width, 3), uint8
    if color is not None:
        planes = levels.transpose(2, 0, 1).astype(np.float32, order="C") / np.float32(255)
        return torch.from_numpy(recolor(planes, color)).mul_(2).sub_(1)
    return torch.from_numpy(levels).permute(2, 0, 1).float().div_(127.5).sub_(1)
