"""The memory of drawing a preview between two steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from spectune.files.dtypes import parse_dtype
from spectune.model.drawing_memory import denoising_bytes, pictures_at_once
from spectune.model.network import new_vae
from spectune.model.vae.fitting import decoding_bytes
from spectune.model.vae.tiles import TILE_PX
from spectune.sdxl.layout import Layout
from spectune.training.memory.account import Setup


@dataclass(frozen=True)
class PreviewBytes:
    """The peak bytes of tensors while a preview is drawn."""

    sampling: int
    decoding: Mapping[str, int]  # by the ways of decode_within_memory


def previews_of(layout: Layout, setup: Setup, resident: int) -> PreviewBytes:
    """Return the bytes of square previews of the training size, with classifier-free guidance.

    `resident` are the bytes of tensors that stay on the GPU.
    """
    assert layout.vae is not None
    pixels, edge = setup.resolution_px**2, 2 ** (len(layout.vae.channels) - 1)
    rows = 2 * pictures_at_once(pixels)
    itemsize = parse_dtype(setup.precision).itemsize
    with torch.device("meta"):
        halved = sum(2 * parameter.numel() for parameter in new_vae(layout.vae).parameters())
    return PreviewBytes(
        sampling=resident + denoising_bytes(layout.unet, rows * pixels // edge**2, itemsize),
        decoding={
            "float32": resident + decoding_bytes(layout.vae, pixels),
            "bfloat16": resident + halved + decoding_bytes(layout.vae, pixels, 2),
            "bfloat16 and tiles": resident + halved + decoding_bytes(layout.vae, min(pixels, TILE_PX**2), 2),
        },
    )
