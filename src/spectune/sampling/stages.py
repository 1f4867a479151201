"""Draw pictures with one kind of network at a time, so that the others need not be on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from spectune.model.network import TextStates
from spectune.model.offload import StagedModel
from spectune.model.text import tokenize
from spectune.model.vae.fitting import decode_within_memory
from spectune.sampling.generate import (
    Request,
    SampleSettings,
    check_size,
    guided_captions,
    sample_latents,
    to_images,
)


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
    texts = _encode(model, [guided_captions(chunk, settings) for chunk in chunks])
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


def _encode(model: StagedModel, batches: Sequence[Sequence[str]]) -> list[TextStates]:
    """Return the encoded captions of each batch, in main memory."""
    if all(caption in model.encoded for captions in batches for caption in captions):
        return [_stacked([model.encoded[caption] for caption in captions]) for captions in batches]
    context = model.sdxl.layout.te1.context
    with model.networks.at_work("text"):
        states = [model.sdxl.encode_text(tokenize(captions, context)) for captions in batches]
        return [TextStates(state.context.cpu(), state.pooled.cpu()) for state in states]


def _stacked(states: Sequence[TextStates]) -> TextStates:
    context = torch.stack([state.context for state in states])
    return TextStates(context.cpu(), torch.stack([state.pooled for state in states]).cpu())
