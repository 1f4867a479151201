"""The memory that drawing needs if all networks are on the device, to choose where they are."""

from __future__ import annotations

import torch

from spectune.files.source import WeightSource
from spectune.model.drawing_memory import denoising_bytes
from spectune.model.vae.fitting import decoding_bytes
from spectune.sampling.generate import SampleSettings
from spectune.sdxl.inference import infer_layout
from spectune.sdxl.layout import VAE_ROOT


def drawing_bytes(source: WeightSource, settings: SampleSettings, dtype: torch.dtype) -> int:
    """Return the bytes of all networks of a checkpoint, with the largest activations of drawing.

    The autoencoder is float32, the other networks have `dtype`.
    """
    layout = infer_layout(source)
    weights = sum(
        info.numel * (4 if name.startswith(VAE_ROOT) else dtype.itemsize)
        for name, info in source.tensors.items()
    )
    edge = 1 if layout.vae is None else 2 ** (len(layout.vae.channels) - 1)
    pixels = settings.width * settings.height
    rows = settings.batch * (1 if settings.cfg == 1.0 else 2)
    denoising = denoising_bytes(layout.unet, rows * pixels // edge**2, dtype.itemsize)
    decoding = 0 if layout.vae is None else decoding_bytes(layout.vae, pixels)
    return weights + max(denoising, decoding)
