"""The trained networks as one module, which accelerate distributes; and what is computed only once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from spectune.model.network import Sdxl, TextStates
from spectune.model.text import tokenize
from spectune.training.data.latents import checked_latents, encode_pictures

__all__ = ["Denoiser", "checked_latents", "encode_captions", "encode_pictures"]

ENCODE_BATCH = 8


class Denoiser(nn.Module):
    """UNet and text encoders; the answer for noised latents and captions."""

    def __init__(self, model: Sdxl, *, trains_text: bool) -> None:
        super().__init__()
        self.unet, self.te1, self.te2 = model.unet, model.te1, model.te2
        self.model = model
        self.dtype, self.device = model.unet.dtype, model.device  # once: diffusers looks through all modules
        self.trains_text = trains_text
        self.text: Mapping[str, TextStates] | None = None  # by caption, when it is fixed

    def forward(self, noised: Tensor, timestep: Tensor, captions: Sequence[str], time_ids: Tensor) -> Tensor:
        """float32 answer of the shape of `noised` (batch, channels, h, w); `time_ids` stay float32."""
        text = self.text_states(captions)
        return self.model.denoise(noised.to(self.dtype), timestep, text, time_ids).float()

    def text_states(self, captions: Sequence[str]) -> TextStates:
        """What the encoders say of the captions, remembered or computed."""
        if self.text is not None:
            known = [self.text[caption] for caption in captions]
            return _on(
                TextStates(torch.stack([k.context for k in known]), torch.stack([k.pooled for k in known])),
                self.device,
            )
        with torch.set_grad_enabled(self.trains_text and torch.is_grad_enabled()):
            return self.model.encode_text(tokenize(captions, self.model.layout.te1.context))

    def checkpoint_gradients(self) -> None:
        """Compute activations twice instead of keeping them."""
        self.unet.enable_gradient_checkpointing()
        if self.trains_text:
            for encoder in (self.te1, self.te2):
                # not reentrant: the embeddings below the first layer ask for no gradient
                encoder.activation_checkpointing_enable(
                    activation_checkpointing_kwargs={"use_reentrant": False}
                )


def _on(text: TextStates, device: torch.device) -> TextStates:
    return TextStates(text.context.to(device), text.pooled.to(device))


@torch.no_grad()
def encode_captions(model: Sdxl, captions: Iterable[str]) -> dict[str, TextStates]:
    """What the frozen encoders say of each caption, kept on the CPU; context is (tokens, width)."""
    distinct = sorted(set(captions))
    found: dict[str, TextStates] = {}
    for start in range(0, len(distinct), ENCODE_BATCH):
        chunk = distinct[start : start + ENCODE_BATCH]
        states = model.encode_text(tokenize(chunk, model.layout.te1.context))
        rows = zip(chunk, states.context.cpu(), states.pooled.cpu(), strict=True)
        found |= {caption: TextStates(context.clone(), pooled.clone()) for caption, context, pooled in rows}
    return found
