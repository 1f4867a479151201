"""Draw pictures with one kind of network at a time, so that the others need not be on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from spectune.files.source import WeightSource
from spectune.model.network import TextStates, denoising_bytes, stack_states
from spectune.model.offload import StagedModel
from spectune.model.vae.fitting import decode_within_memory, decoding_bytes
from spectune.sampling.generate import (
    Request,
    SampleSettings,
    check_size,
    guided_captions,
    sample_latents,
    to_images,
)
from spectune.sdxl.inference import infer_layout
from spectune.sdxl.layout import VAE_ROOT


@torch.no_grad()
def draw_in_stages(
    model: StagedModel,
    requests: Sequence[Request],
    settings: SampleSettings,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[Image.Image]:
    """Draw one picture per request, in order.

    `progress` is called with the number of sampled pictures. Apart from rounding, a picture does not depend
    on the other pictures of its batch.

    Raises:
        InputError: The UNet does not support the size, or the sampler is unknown.
    """
    check_size(model.sdxl, settings)
    chunks = [requests[start : start + settings.batch] for start in range(0, len(requests), settings.batch)]
    texts = _encode(model, [guided_captions(chunk, settings) for chunk in chunks], settings.max_tokens)
    latents: list[Tensor] = []
    with model.networks.at_work("unet"):
        for chunk, text in zip(chunks, texts, strict=True):
            latents.extend(sample_latents(model.sdxl, chunk, settings, text).unbind())
            if progress is not None:
                progress(len(latents))
    pixels = settings.width * settings.height
    with model.networks.at_work("vae"):
        # one at a time: the decoder needs gigabytes for a single large picture
        decoded = decode_within_memory(model.sdxl, latents, pixels=pixels, notify=model.notify)
        return [to_images(picture)[0] for picture in decoded]


def _encode(model: StagedModel, batches: Sequence[Sequence[str]], max_tokens: int) -> list[TextStates]:
    """Return the encoded captions of each batch, in main memory."""
    if all(caption in model.encoded for captions in batches for caption in captions):
        return [stack_states([model.encoded[caption] for caption in batch]).to("cpu") for batch in batches]
    with model.networks.at_work("text"):
        states = [model.sdxl.encode_captions(batch, max_tokens=max_tokens) for batch in batches]
        return [state.to("cpu") for state in states]


def drawing_bytes(source: WeightSource, settings: SampleSettings, dtype: torch.dtype) -> int:
    """Return the bytes of all networks of a checkpoint, with the largest activations of drawing.

    The autoencoder is float32, the other networks have `dtype`.
    """
    layout = infer_layout(source)
    weights = sum(
        info.numel * (4 if name.startswith(VAE_ROOT) else dtype.itemsize)
        for name, info in source.tensors.items()
    )
    # a separate autoencoder has at least as many pixels per latent as SDXL's
    edge = 8 if layout.vae is None else layout.vae.pixels_per_latent
    pixels = settings.width * settings.height
    rows = settings.batch * (1 if settings.cfg == 1.0 else 2)
    denoising = denoising_bytes(layout.unet, rows * pixels // edge**2, dtype.itemsize)
    decoding = 0 if layout.vae is None else decoding_bytes(layout.vae, pixels)
    return weights + max(denoising, decoding)
