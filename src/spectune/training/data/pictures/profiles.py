"""Color profiles (ICC): convert images to sRGB, the color space that SDXL was trained in."""

from __future__ import annotations

from enum import Enum
from functools import lru_cache
from io import BytesIO
from typing import Any, cast

import numpy as np
from PIL import Image, ImageCms

# Pictures whose profile changes no channel by more than this are left unchanged: many profiles describe sRGB.
SAME_LEVELS = 2
_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}


class ProfileKind(Enum):
    """The kind of an image's color profile."""

    NONE = "none"
    SRGB = "sRGB"
    OTHER = "other"  # converted
    UNUSABLE = "unusable"  # damaged, or for another kind of image


def profile_kind(image: Image.Image) -> ProfileKind:
    """Return the kind of the color profile of a loaded image."""
    profile = image.info.get("icc_profile")
    return _kind(bytes(profile), image.mode == "CMYK") if profile else ProfileKind.NONE


def to_srgb(colors: Image.Image, kind: ProfileKind) -> Image.Image:
    """Return an image without alpha, in mode L, RGB or CMYK, as RGB in sRGB.

    The intent is relative colorimetric with black point compensation: colors that sRGB contains are kept.
    """
    if kind is ProfileKind.OTHER:
        profile = _opened(colors.info["icc_profile"])
        return _converted(colors.convert(_mode(profile)), profile)
    return colors.convert("RGB")


@lru_cache(maxsize=64)  # the images of a folder often have the same profile
def _kind(data: bytes, is_cmyk: bool) -> ProfileKind:
    try:
        profile = _opened(data)
        if (_mode(profile) == "CMYK") != is_cmyk:
            return ProfileKind.UNUSABLE
        probe = _probe(_mode(profile))
        changed = _converted(probe, profile)
    # Damaged profiles raise these, and KeyError those of other color spaces.
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, KeyError):
        return ProfileKind.UNUSABLE
    if is_cmyk:
        return ProfileKind.OTHER
    before, after = (np.asarray(image, dtype=np.int16) for image in (probe.convert("RGB"), changed))
    return ProfileKind.SRGB if abs(before - after).max() <= SAME_LEVELS else ProfileKind.OTHER


def _opened(data: bytes) -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(BytesIO(data))


def _mode(profile: ImageCms.ImageCmsProfile) -> str:
    return _MODES[cast("Any", profile.profile).xcolor_space]


def _converted(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    converted = ImageCms.profileToProfile(
        image,
        profile,
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    assert converted is not None
    return converted


def _probe(mode: str) -> Image.Image:
    """Return a test image with colors from the whole range of a mode, such as RGB."""
    if mode == "CMYK":
        return Image.new("CMYK", (1, 1))
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1)
    return Image.fromarray(np.ascontiguousarray(grid.reshape(1, -1, 3)))
