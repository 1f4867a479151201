"""The trained networks as one module, which accelerate can distribute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from spectune.model.network import Sdxl, TextStates, stack_states
from spectune.model.text import tokenize
from spectune.sdxl.vocabulary import MAX_TOKENS
from spectune.training.processes.sharing import shared

ENCODE_BATCH = 8  # captions


class Denoiser(nn.Module):
    """The UNet and the text encoders as one network from noised latents and captions to a prediction."""

    def __init__(self, model: Sdxl, *, trains_text: bool, max_tokens: int = MAX_TOKENS) -> None:
        super().__init__()
        self.unet, self.te1, self.te2 = model.unet, model.te1, model.te2
        self.model = model
        self.dtype = model.unet.dtype  # cached: diffusers searches all modules at each access
        self.trains_text = trains_text
        self.max_tokens = max_tokens  # of a caption
        self.text: Mapping[str, TextStates] | None = None  # by caption, if all captions are cached

    def forward(self, noised: Tensor, timestep: Tensor, captions: Sequence[str], time_ids: Tensor) -> Tensor:
        """Return the prediction, float32 and with the shape of `noised`, (batch, channels, h, w)."""
        text = self.text_states(captions)
        return self.model.denoise(noised.to(self.dtype), timestep, text, time_ids).float()

    def text_states(self, captions: Sequence[str]) -> TextStates:
        """Return the encoded captions, cached or computed."""
        if self.text is not None:
            device = next(self.unet.parameters()).device
            return stack_states([self.text[caption] for caption in captions]).to(device)
        with torch.set_grad_enabled(self.trains_text and torch.is_grad_enabled()):
            return self.model.encode_captions(captions, max_tokens=self.max_tokens)

    def checkpoint_gradients(self) -> None:
        """Recompute activations in the backward pass instead of keeping them (gradient checkpointing)."""
        self.unet.enable_gradient_checkpointing()
        if self.trains_text:
            for encoder in (self.te1, self.te2):
                # not reentrant: the embeddings below the first layer need no gradient
                encoder.activation_checkpointing_enable(
                    activation_checkpointing_kwargs={"use_reentrant": False}
                )


@torch.no_grad()
def encode_captions(
    model: Sdxl,
    captions: Iterable[str],
    *,
    max_tokens: int = MAX_TOKENS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, TextStates]:
    """Return the output of the text encoders for each caption, on the CPU; context is (tokens, width)."""
    distinct = sorted(set(captions))
    batches = [distinct[start : start + ENCODE_BATCH] for start in range(0, len(distinct), ENCODE_BATCH)]

    def encoded(batch: Sequence[str]) -> dict[str, TextStates]:
        ids = tokenize(batch, model.layout.te1.context, max_tokens=max_tokens)
        text = model.encode_text(ids).to("cpu")
        states: dict[str, TextStates] = {}
        for row, caption in enumerate(batch):
            tokens = ids.te1.shape[1] * (1 if ids.chunks is None else ids.chunks[row])
            states[caption] = TextStates(text.context[row, :tokens].clone(), text.pooled[row].clone())
        return states

    states: dict[str, TextStates] = {}
    for rows in shared(batches, encoded):
        states |= rows
        progress(len(states), len(distinct))
    return states
