"""Color profiles. The expected colors are from the definitions of the color spaces, not from ImageCms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from spectune.training.data.images import load_image, open_image
from spectune.training.data.pictures.profiles import ProfileKind, profile_kind
from tests.training.data.icc import gray_profile, rgb_profile

# Primaries and white point D65 of Adobe RGB (1998), with gamma 563/256
ADOBE = rgb_profile([(0.64, 0.33), (0.21, 0.71), (0.15, 0.06)], gamma=563 / 256)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ADOBE_TO_XYZ = np.array(
    [[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]]
)
XYZ_TO_SRGB = np.array(
    [
        [3.2404542, -1.5371385, -0.4985314],
        [-0.969266, 1.8760108, 0.041556],
        [0.0556434, -0.2040259, 1.0572252],
    ]
)


def srgb_of(adobe: tuple[int, int, int]) -> list[float]:
    linear = XYZ_TO_SRGB @ ADOBE_TO_XYZ @ (np.array(adobe) / 255) ** (563 / 256)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clip(0) ** (1 / 2.4) - 0.055)
    return list((255 * encoded).clip(0, 255))


def test_adobe_rgb_becomes_srgb(tmp_path: Path) -> None:
    color = (100, 150, 120)
    Image.new("RGB", (8, 8), color).save(tmp_path / "a.png", icc_profile=ADOBE)
    Image.new("RGBA", (8, 8), (*color, 255)).save(tmp_path / "alpha.png", icc_profile=ADOBE)
    for name in ("a.png", "alpha.png"):
        pixel = open_image(tmp_path / name).getpixel((0, 0))
        assert pixel == pytest.approx(srgb_of(color), abs=1.5)
        assert pixel != color
        assert profile_kind(load_image(tmp_path / name)) is ProfileKind.OTHER


def test_gray_profiles_and_transparent_pixels(tmp_path: Path) -> None:
    Image.new("LA", (8, 8), (128, 255)).save(tmp_path / "gray.png", icc_profile=gray_profile(1.0))
    # linear light: 128/255 is encoded as 188
    assert open_image(tmp_path / "gray.png").getpixel((0, 0)) == (188, 188, 188)
    Image.new("RGBA", (8, 8), (100, 150, 120, 0)).save(tmp_path / "clear.png", icc_profile=ADOBE)
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("profile", "kind"),
    [
        (SRGB, ProfileKind.SRGB),
        (b"", ProfileKind.NONE),
        (b"no profile", ProfileKind.UNUSABLE),
        (ADOBE[:200], ProfileKind.UNUSABLE),
    ],
)
def test_other_profiles_change_nothing(profile: bytes, kind: ProfileKind, tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "a.png", icc_profile=profile)
    assert profile_kind(load_image(tmp_path / "a.png")) is kind
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), levels)


def test_a_profile_for_another_kind_of_image_is_unusable(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95, icc_profile=ADOBE)
    assert profile_kind(load_image(tmp_path / "print.jpg")) is ProfileKind.UNUSABLE
    red, green, blue = open_image(tmp_path / "print.jpg").getpixel((0, 0))  # pyright: ignore
    assert (red > 250, green < 5, blue < 5) == (True, True, True)
