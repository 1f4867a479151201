"""Run a training step on the meta device and count the bytes that are allocated at once.

Modules, adapters and checkpointing are those of a real run; only the device differs. All tensors have the
shapes, dtypes and lifetimes of a real step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectune.model.network import Sdxl, TextStates
from spectune.model.text import TokenIds
from spectune.sdxl.vocabulary import CHUNK_TOKENS
from spectune.training.denoiser import Denoiser
from spectune.training.memory.account import Setup
from spectune.training.memory.live_bytes import LiveBytes, attention_of_gpus
from spectune.training.memory.meta_model import META


@dataclass(frozen=True)
class StepBytes:
    """The bytes that a forward and a backward pass add to a model whose gradients already exist."""

    kept: int  # between the passes, for the backward pass
    peak: int
    reached: frozenset[str]  # names of the trained tensors that get a gradient


def measure_step(
    model: Sdxl,
    trained: Mapping[str, nn.Parameter],
    joined: Sequence[Tensor],
    setup: Setup,
) -> StepBytes:
    """Measure a step of a setup on square images with captions of `max_tokens` tokens.

    `model` stays in training mode, with checkpointing if it is set. `joined` are the joined factors, which
    exist before the step.
    """
    trains_text = any(tensor.requires_grad for part in (model.te1, model.te2) for tensor in part.parameters())
    denoiser = Denoiser(model, trains_text=trains_text)
    if setup.gradient_checkpointing:
        denoiser.checkpoint_gradients()
    denoiser.train()
    reached: set[str] = set()
    for name, tensor in trained.items():
        tensor.register_post_accumulate_grad_hook(_reaching(name, reached, frees=setup.step_in_backward))
        if not setup.step_in_backward:
            tensor.grad = torch.zeros_like(tensor)
    existing = [
        *denoiser.parameters(),
        *denoiser.buffers(),
        *joined,
        *(tensor.grad for tensor in trained.values() if tensor.grad is not None),
    ]
    with attention_of_gpus(), LiveBytes(existing) as counter:
        chunks = setup.max_tokens // CHUNK_TOKENS
        loss = _loss(model, setup.batch, setup.resolution_px, chunks, trains_text=trains_text)
        kept = counter.live
        loss.backward()
    for tensor in trained.values():
        tensor.grad = None
    return StepBytes(kept=kept, peak=counter.peak, reached=frozenset(reached))


def _reaching(name: str, reached: set[str], *, frees: bool) -> Callable[[Tensor], None]:
    """Return a hook that notes that a tensor got its gradient, and may step as `TensorSteps` does."""

    def hook(tensor: Tensor) -> None:
        reached.add(name)
        if frees:
            assert tensor.grad is not None
            # float32 copies of tensor and gradient, and two more that an optimizer needs at its peak
            copies = [torch.empty_like(tensor, dtype=torch.float32) for _ in range(4)]
            del copies
            tensor.grad = None

    return hook


def encoding_bytes(model: Sdxl, resolution_px: int) -> int:
    """Return the peak bytes of the activations of encoding one image; 0 without an autoencoder."""
    if model.vae is None:
        return 0
    pixels = torch.empty((1, 3, resolution_px, resolution_px), device=META)
    with torch.no_grad(), attention_of_gpus(), LiveBytes(model.vae.parameters()) as counter:
        model.encode_images(pixels)
    return counter.peak


def _loss(model: Sdxl, batch: int, resolution_px: int, chunks: int, *, trains_text: bool) -> Tensor:
    layout, device, dtype = model.layout, model.device, model.unet.dtype
    edge = resolution_px // model.pixels_per_latent
    tokens = torch.zeros((batch * chunks, layout.te1.context), dtype=torch.long, device=device)
    if trains_text:
        text = model.encode_text(TokenIds(tokens, tokens, (chunks,) * batch))
    else:
        text = TextStates(
            context=torch.zeros(
                (batch, chunks * layout.te1.context, layout.unet.context), dtype=dtype, device=device
            ),
            pooled=torch.zeros((batch, layout.unet.pooled), dtype=dtype, device=device),
        )
    noised = torch.zeros((batch, layout.unet.in_channels, edge, edge), device=device)
    prediction = model.denoise(
        noised.to(dtype), torch.zeros(batch, device=device), text, torch.zeros((batch, 6), device=device)
    )
    return F.mse_loss(prediction.float(), noised)
