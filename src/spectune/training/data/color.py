"""Small random changes of hue, saturation and gamma. Levels are in 0..1."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

Levels = NDArray[np.float32]  # (3, height, width) in 0..1

# Hue and gamma have the ranges of kohya's color_aug: 8 of OpenCV's 180 steps of hue, gamma 0.95..1.05.
HUE_TURNS = 8 / 180
SATURATION = 0.1
GAMMA = 0.05


@dataclass(frozen=True)
class ColorChange:
    """A change of every pixel of an image: first hue and saturation, then gamma."""

    hue: float  # added, in turns of the color wheel
    saturation: float  # factor
    gamma: float  # exponent


def draw_color(probability: float, random: Random) -> ColorChange | None:
    """Return a random change, or None for unchanged colors."""
    # At 0, do not draw a number: it would change the random choices that follow.
    if probability == 0 or random.random() >= probability:
        return None
    return ColorChange(
        hue=random.uniform(-HUE_TURNS, HUE_TURNS),
        saturation=random.uniform(1 - SATURATION, 1 + SATURATION),
        gamma=random.uniform(1 - GAMMA, 1 + GAMMA),
    )


def recolor(levels: Levels, change: ColorChange) -> Levels:
    """Return the changed levels; saturation is clipped at 1.

    This uses numpy, because the last bit of torch's power depends on the number of threads, which differs in
    workers.
    """
    hsv = to_hsv(levels)
    hsv[0] += change.hue
    hsv[0] -= np.floor(hsv[0])
    hsv[1] = (hsv[1] * change.saturation).clip(0, 1)
    # Gamma applies to levels in 0..1. On 0..255, as in kohya, it would scale all levels by 255^(gamma - 1).
    return from_hsv(hsv).clip(0, 1) ** np.float32(change.gamma)


def to_hsv(levels: Levels) -> Levels:
    """Return hue in turns, saturation and value, all in 0..1 (Smith 1978). Grays have hue 0."""
    red, green, blue = levels
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    safe = np.where(chroma > 0, chroma, np.float32(1))
    sixths = np.where(
        value == red, green - blue, np.where(value == green, blue - red + 2 * safe, red - green + 4 * safe)
    )
    hue = sixths / (6 * safe)
    saturation = chroma / np.where(value > 0, value, np.float32(1))
    return np.stack([hue - np.floor(hue), saturation, value])


def from_hsv(hsv: Levels) -> Levels:
    """Return the RGB levels of an image in HSV, the inverse of `to_hsv`."""
    hue, saturation, value = hsv
    chroma, sixths = value * saturation, hue * 6
    channels = []
    for offset in (5, 3, 1):  # red, green, blue
        place = sixths + np.float32(offset)
        place -= 6 * (place >= 6)
        channels.append(value - chroma * np.minimum(place, 4 - place).clip(0, 1))
    return np.stack(channels)
