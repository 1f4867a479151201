"""Encode as exactly as the memory of the device allows.

The bytes of one picture are counted in tests/model/vae/test_encoding.py, on a full SDXL.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from spectune.model.device import drawing_dtype
from spectune.model.network import Sdxl
from spectune.model.vae.fitting import fits, in_bfloat16
from spectune.model.vae.tiles import TILE_PX
from spectune.model.vae.ways import ENCODE_WAYS, EncodeWay
from spectune.sdxl.layout import VaeLayout


def encoding_bytes(layout: VaeLayout, pixels: int, way: EncodeWay = "float32") -> int:
    """Return the peak bytes of the tensors of the encoder for pictures with so many pixels together.

    Tiles are float32.
    """
    if way == "tiles":
        pixels = min(pixels, TILE_PX**2)
    return 5 * layout.channels[0] * pixels * (2 if way == "bfloat16" else 4)


def most_exact_way(model: Sdxl, pixels: int, *, reserved: int = 0) -> EncodeWay:
    """Return the most exact way to encode within the free memory of the device of the autoencoder.

    Args:
        model: A model whose autoencoder is on the device to encode on.
        pixels: The largest number of pixels that are encoded at once.
        reserved: Bytes of the device that other tensors will take before the encoding.
    """
    vae, layout = model.vae, model.layout.vae
    assert vae is not None
    assert layout is not None
    has_bfloat16 = drawing_dtype(str(vae.device)) == torch.bfloat16
    for way in ENCODE_WAYS:
        is_possible = way != "bfloat16" or has_bfloat16
        if is_possible and fits(reserved + encoding_bytes(layout, pixels, way), vae.device):
            return way
    return "tiles"


def encoder_of(model: Sdxl, way: EncodeWay) -> Sdxl:
    """Return a model that encodes in a way. Its other networks are those of `model`."""
    if way == "tiles":
        return replace(model, vae_tiles=True)
    if way == "bfloat16":
        assert model.vae is not None
        return replace(model, vae=in_bfloat16(model.vae))
    return model
