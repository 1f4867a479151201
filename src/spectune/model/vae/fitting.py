"""Decode as exactly as the memory of the device allows, and say so where that is not exact.

The bytes of one picture are counted in tests/model/vae/test_fitting.py, on a full SDXL.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from spectune.model.device import drawing_dtype, free_bytes
from spectune.model.network import Autoencoder, Sdxl
from spectune.model.vae.tiles import TILE_PX
from spectune.sdxl.layout import VaeLayout

SAFETY = 1.1  # for workspaces of convolutions, and for free blocks that are too small
Notify = Callable[[str], None]


def decoding_bytes(layout: VaeLayout, pixels: int, itemsize: int = 4) -> int:
    """Return the peak bytes of the tensors of the decoder for a picture with so many pixels."""
    # the last upsampling: its input, its output, and a copy with normalized values
    return 3 * max(layout.channels[:2]) * pixels * itemsize


def fits(nbytes: int, device: torch.device | str) -> bool:
    """Return whether tensors of so many bytes fit into the free memory of a device."""
    free = free_bytes(device)
    return free is None or SAFETY * nbytes <= free


def decode_within_memory(
    model: Sdxl, latents: Iterable[Tensor], *, pixels: int, notify: Notify
) -> Iterator[Tensor]:
    """Yield the pixels (1, 3, H, W) of each of `latents`, (channels, h, w).

    Args:
        model: A model whose autoencoder is on the device to decode on.
        latents: The latents of pictures of one size.
        pixels: The area of a picture.
        notify: Called with the reason if the pictures are not decoded in one piece, in the dtype of the
            autoencoder.
    """
    assert model.vae is not None
    device, fitting = model.vae.device, _most_exact(model, pixels, notify)
    for row in latents:
        decoded = fitting.decode_latents(row[None].to(device))
        if fitting.vae is not model.vae and not bool(decoded.isfinite().all()):
            notify("the autoencoder's values are not finite in bfloat16: decoding in float32, in tiles")
            fitting = replace(model, vae_tiles=True)
            decoded = fitting.decode_latents(row[None].to(device))
        yield decoded


def _most_exact(model: Sdxl, pixels: int, notify: Notify) -> Sdxl:
    """Return `model` if it decodes within the free memory, otherwise a less exact one that needs less."""
    vae, layout = model.vae, model.layout.vae
    assert vae is not None
    assert layout is not None
    needed = decoding_bytes(layout, pixels, vae.dtype.itemsize)
    if fits(needed, vae.device):
        return model
    free = (free_bytes(vae.device) or 0) / 1e9
    reason = (
        f"decoding in one piece in {_name(vae.dtype)} needs {needed / 1e9:.1f} GB, {free:.1f} GB are free"
    )
    if drawing_dtype(str(vae.device)) != torch.bfloat16:
        notify(f"pictures are decoded in tiles of {TILE_PX} px, because {reason}")
        return replace(model, vae_tiles=True)
    half = replace(model, vae=in_bfloat16(vae))
    if fits(needed * 2 // vae.dtype.itemsize, vae.device):
        notify(f"pictures are decoded in bfloat16, because {reason}")
        return half
    notify(f"pictures are decoded in bfloat16 and tiles of {TILE_PX} px, because {reason}")
    return replace(half, vae_tiles=True)


def in_bfloat16(vae: Autoencoder) -> Autoencoder:
    """Return a copy of an autoencoder in bfloat16, on the same device."""
    copied = copy.deepcopy(vae)
    # the `to` of diffusers would warn
    nn.Module.to(copied, torch.bfloat16)
    return copied


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
