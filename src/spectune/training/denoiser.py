"""The trained networks as one module, which accelerate distributes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from spectune.model.network import Sdxl, TextStates
from spectune.model.text import tokenize

ENCODE_BATCH = 8  # captions


class Denoiser(nn.Module):
    """UNet and text encoders; predicts from noised latents and captions."""

    def __init__(self, model: Sdxl, *, trains_text: bool) -> None:
        super().__init__()
        self.unet, self.te1, self.te2 = model.unet, model.te1, model.te2
        self.model = model
        # read once: diffusers searches all modules for them
        self.dtype, self.device = model.unet.dtype, model.device
        self.trains_text = trains_text
        self.text: Mapping[str, TextStates] | None = None  # by caption, when encoders and captions are fixed

    def forward(self, noised: Tensor, timestep: Tensor, captions: Sequence[str], time_ids: Tensor) -> Tensor:
        """Return the prediction, float32 (batch, channels, h, w) as `noised`; `time_ids` stay float32."""
        text = self.text_states(captions)
        return self.model.denoise(noised.to(self.dtype), timestep, text, time_ids).float()

    def text_states(self, captions: Sequence[str]) -> TextStates:
        """Return the encoded captions, cached or computed."""
        if self.text is not None:
            known = [self.text[caption] for caption in captions]
            context = torch.stack([k.context for k in known]).to(self.device)
            return TextStates(context, torch.stack([k.pooled for k in known]).to(self.device))
        with torch.set_grad_enabled(self.trains_text and torch.is_grad_enabled()):
            return self.model.encode_text(tokenize(captions, self.model.layout.te1.context))

    def checkpoint_gradients(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.unet.enable_gradient_checkpointing()
        if self.trains_text:
            for encoder in (self.te1, self.te2):
                # not reentrant: the embeddings below the first layer need no gradient
                encoder.activation_checkpointing_enable(
                    activation_checkpointing_kwargs={"use_reentrant": False}
                )


@torch.no_grad()
def encode_captions(model: Sdxl, captions: Iterable[str]) -> dict[str, TextStates]:
    """Return the frozen encoders' output for each caption, on the CPU; context is (tokens, width)."""
    distinct = sorted(set(captions))
    states: dict[str, TextStates] = {}
    for start in range(0, len(distinct), ENCODE_BATCH):
        chunk = distinct[start : start + ENCODE_BATCH]
        encoded = model.encode_text(tokenize(chunk, model.layout.te1.context))
        rows = zip(chunk, encoded.context.cpu(), encoded.pooled.cpu(), strict=True)
        states |= {caption: TextStates(context.clone(), pooled.clone()) for caption, context, pooled in rows}
    return states
