"""Read image files as upright 8-bit RGB images, and turn them into tensors."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from spectune.errors import printable
from spectune.training.data.buckets import Placement, Size
from spectune.training.data.color import ColorChange, recolor
from spectune.training.data.pictures.formats import UnusableImage, open_picture
from spectune.training.data.pictures.png import has_late_text
from spectune.training.data.pictures.profiles import ProfileKind, profile_kind, to_srgb

# sd-scripts averages areas to shrink images, which is a little softer, and enlarges with Lanczos too.
RESAMPLING = Image.Resampling.LANCZOS

# Pillow's decoders raise any of these for damaged files.
_DECODER_ERRORS = (
    *(ArithmeticError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError),
    *(TypeError, ValueError, struct.error, Image.DecompressionBombError),
)


# In these formats, the header tells size, rotation and transparency.
_PLAIN_FORMATS = ("AVIF", "BMP", "JPEG", "MPO", "PNG", "WEBP")
_TURNED = (5, 6, 7, 8)  # orientations of EXIF with width and height exchanged


@dataclass(frozen=True)
class Header:
    """The facts about an image file that are known without decoding it."""

    pixels: int
    has_more_frames: bool  # animations, and files with several pages
    upright: Size | None  # after the EXIF rotation; None: only decoding tells this and what follows
    has_alpha: bool = False
    profile: ProfileKind = ProfileKind.NONE


def read_header(path: Path) -> Header:
    """Return the facts in the header of an image file.

    Raises:
        UnusableImage: The file is no image, or is too large.
    """
    with _reasons(), open_picture(path) as image:
        # MPO is a JPEG with more frames: the first is the image, others are previews or a second view
        several = bool(getattr(image, "is_animated", False)) and image.format not in ("MPO", "HEIF")
        pixels = image.width * image.height
        if image.format not in _PLAIN_FORMATS or (image.format == "PNG" and has_late_text(path)):
            return Header(pixels, several, None)
        # of Image: the method of a PNG decodes it, because text may follow the pixels
        turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation) in _TURNED
        upright = Size(image.height, image.width) if turned else Size(image.width, image.height)
        return Header(pixels, several, upright, has_alpha(image), profile_kind(image))


def open_image(path: Path) -> Image.Image:
    """Read an image as RGB in sRGB, rotated by its EXIF data, with white behind transparent pixels.

    Raises:
        UnusableImage: The file is damaged, truncated or too large.
    """
    return as_rgb(load_image(path))


def load_image(path: Path) -> Image.Image:
    """Read the first image in a file, rotated by its EXIF data, in the mode of the file.

    Raises:
        UnusableImage: The file is damaged, truncated or too large.
    """
    with _reasons(), open_picture(path) as image:
        image.load()
        return ImageOps.exif_transpose(image)


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn the errors of Pillow into UnusableImage."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise UnusableImage("is not an image that Pillow can read") from error
    except _DECODER_ERRORS as error:
        if isinstance(error, OSError) and error.strerror:
            raise UnusableImage(f"cannot be read: {error.strerror}") from error
        raise UnusableImage(f"is damaged: {printable(str(error) or type(error).__name__)}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image to RGB in sRGB, with white behind transparent pixels.

    Raises:
        UnusableImage: The levels are floating-point numbers of unknown range.
    """
    if image.mode == "F":
        raise UnusableImage("holds floating-point levels, whose range is not known")
    with _reasons():
        alpha = alpha_of(image)
        colors = to_srgb(_without_alpha(image), profile_kind(image))
        if alpha is None:
            return colors
        colors.putalpha(alpha)
        return Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors).convert("RGB")


def alpha_of(image: Image.Image) -> Image.Image | None:
    """Return the alpha channel of a loaded image as an 8-bit gray image, or None if it has none."""
    return image.convert("RGBA").getchannel("A") if has_alpha(image) else None


def has_alpha(image: Image.Image) -> bool:
    """Return whether a loaded image has transparency."""
    # Pillow cannot convert 16-bit gray to RGBA
    return not image.mode.startswith("I") and (
        "transparency" in image.info or image.mode in ("LA", "PA", "RGBA", "RGBa", "La")
    )


def _without_alpha(image: Image.Image) -> Image.Image:
    """Return the colors of an image in mode L, RGB or CMYK, with 8 bits."""
    if image.mode.startswith("I"):
        # 16-bit gray: Pillow's own conversion clips at 255 instead of scaling.
        levels = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        gray = Image.fromarray(levels)
        gray.info = image.info
        return gray
    if has_alpha(image):
        return image.convert("RGBA").convert("RGB")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


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
    levels = np.array(cut_out(image, placement, RESAMPLING))  # (height, width, 3), uint8
    if color is not None:
        planes = levels.transpose(2, 0, 1).astype(np.float32, order="C") / np.float32(255)
        return torch.from_numpy(recolor(planes, color)).mul_(2).sub_(1)
    return torch.from_numpy(levels).permute(2, 0, 1).float().div_(127.5).sub_(1)
