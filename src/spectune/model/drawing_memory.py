"""The memory that the UNet needs to draw, and the number of pictures of a preview that are drawn at once."""

from __future__ import annotations

from spectune.sdxl.layout import UNetLayout

DRAWING_BATCH = 4  # pictures


def denoising_bytes(layout: UNetLayout, area: int, itemsize: int) -> int:
    """Return the peak bytes of the tensors of the UNet, for latents of the area (rows * height * width)."""
    return 16 * layout.channels[0] * area * itemsize


def pictures_at_once(pixels: int) -> int:
    """Return the number of pictures of an area that a preview samples at once: 1024 px squared, or one.

    Sampling should need less memory than a training step.
    """
    return min(DRAWING_BATCH, max(1, 1024 * 1024 // pixels))
