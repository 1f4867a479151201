"""The picture formats that are read, and the only function that opens a picture of a user."""

from __future__ import annotations

import warnings
from functools import cache
from io import BytesIO
from pathlib import Path

from PIL import Image, features

from spectune.training.data.pictures.tar_files import member_of

# By Pillow's names. Pillow has more decoders; some start other programs, like Ghostscript for EPS.
_SUFFIXES = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),  # includes MPO
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif", ".hif"),
}
HEIF_SUFFIXES = frozenset(_SUFFIXES["HEIF"])

# Formats that are counted when they lie beside images.
_OTHER_SUFFIXES = frozenset(
    {
        ".arw", ".cr2", ".cr3", ".dds", ".dng", ".eps", ".exr", ".hdr", ".ico", ".j2k", ".jp2",
        ".jxl", ".kra", ".mkv", ".mov", ".mp4", ".nef", ".orf", ".pcx", ".pdf", ".pgm", ".ppm",
        ".psd", ".qoi", ".raf", ".rw2", ".svg", ".tga", ".webm", ".xcf",
    }
)  # fmt: skip

# A larger image takes more than 0.5 GB to decode. Photos of 108 million pixels, from phones, are smaller.
MOST_PIXELS = 128_000_000

# Pillow warns from 89 million pixels on; MOST_PIXELS is checked instead.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnusableImage(Exception):
    """An image that cannot be trained on; the message gives the reason."""


@cache
def formats() -> tuple[str, ...]:
    """Return the formats that this installation reads."""
    missing = {name for name in ("AVIF", "WEBP") if not features.check(name.lower())}
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        missing.add("HEIF")
    else:
        register_heif_opener()
    return tuple(name for name in _SUFFIXES if name not in missing)


def is_picture(path: Path) -> bool:
    """Return whether the suffix of a file is that of a format that this installation reads."""
    return path.suffix.lower() in _readable()


def is_unread_picture(path: Path) -> bool:
    """Return whether the suffix of a file is that of a picture or film that cannot be read here."""
    suffix = path.suffix.lower()
    known = _OTHER_SUFFIXES.union(*_SUFFIXES.values())
    return suffix in known and suffix not in _readable()


@cache
def _readable() -> frozenset[str]:
    return frozenset(suffix for name in formats() for suffix in _SUFFIXES[name])


def open_picture(path: Path) -> Image.Image:
    """Open a picture without decoding it. The format follows from the content, not from the suffix.

    Raises:
        UnusableImage: The image has more than MOST_PIXELS pixels.
        Others: Whatever Pillow raises for files that it cannot read.
    """
    member = member_of(path)
    source = path if member is None else BytesIO(member.read())
    image = Image.open(source, formats=formats())
    width, height = image.size
    if width * height > MOST_PIXELS:
        image.close()
        raise UnusableImage(
            f"has {width}x{height} pixels, more than {MOST_PIXELS // 10**6} million; make it smaller"
        )
    return image
