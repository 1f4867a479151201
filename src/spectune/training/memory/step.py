"""A training step on torch's meta device: what is alive in it at once, without its numbers and its memory.

The modules, adapters and checkpointing are those of a real run; only the device is another. Shapes and types
of all that a step makes are then known, and the life of each storage is that of a real step.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from spectune.core.low_rank import LowRank
from spectune.model.network import Sdxl, TextStates, new_unet, new_vae, text_config
from spectune.model.prediction import make_prediction
from spectune.model.text import TokenIds
from spectune.sdxl.layers import Layer
from spectune.sdxl.layout import Layout
from spectune.training.denoiser import Denoiser

META = torch.device("meta")


@dataclass(frozen=True)
class StepBytes:
    """What a forward and a backward pass add to a model whose gradients exist already."""

    kept: int  # alive between the passes: what the backward pass needs
    peak: int  # the most that is alive at once
    reached: frozenset[str]  # the trained tensors that get a gradient


def empty_model(layout: Layout, dtype: torch.dtype) -> Sdxl:
    """The model of a layout on the meta device, with the types that `build_model` gives it."""
    with init_empty_weights(include_buffers=False):
        unet = new_unet(layout.unet)
        te1 = CLIPTextModel(text_config(layout.te1))
        te2 = CLIPTextModelWithProjection(text_config(layout.te2))
        vae = None if layout.vae is None else new_vae(layout.vae)
    modules: tuple[nn.Module, ...] = (unet, te1, te2)
    for module in modules:
        # past diffusers' own `to`, which warns of every cast
        nn.Module.to(module, device=META, dtype=dtype).requires_grad_(False).eval()
    if vae is not None:
        nn.Module.to(vae, META).requires_grad_(False).eval()  # float32, as build_model keeps it
    return Sdxl(unet=unet, te1=te1, te2=te2, vae=vae, layout=layout, prediction=make_prediction("eps"))


def empty_frame(layer: Layer, rank: int) -> LowRank:
    """A frame of float32 factors on the meta device."""
    ones = (1,) * (len(layer.shape) - 2)
    return LowRank(
        down=torch.empty((rank, *layer.shape[1:]), device=META),
        up=torch.empty((layer.shape[0], rank, *ones), device=META),
        alpha=float(rank),
    )


def measure_step(
    model: Sdxl, trained: Mapping[str, nn.Parameter], *, checkpointing: bool, batch: int, resolution_px: int
) -> StepBytes:
    """Run a step on square pictures and count; leaves `model` training, with checkpointing if asked."""
    trains_text = any(tensor.requires_grad for part in (model.te1, model.te2) for tensor in part.parameters())
    denoiser = Denoiser(model, trains_text=trains_text)
    if checkpointing:
        denoiser.checkpoint_gradients()
    denoiser.train()
    for tensor in trained.values():
        tensor.grad = torch.zeros_like(tensor)
    own = [
        *denoiser.parameters(),
        *denoiser.buffers(),
        *(tensor.grad for tensor in trained.values() if tensor.grad is not None),
    ]
    with attention_of_gpus(), LiveBytes(own) as alive:
        loss = _loss(model, batch, resolution_px, trains_text=trains_text)
        kept = alive.live
        loss.backward()
    # a gradient that was added to has another version than a new one
    reached = {name for name, tensor in trained.items() if tensor.grad is not None and tensor.grad._version}
    for tensor in trained.values():
        tensor.grad = None
    return StepBytes(kept=kept, peak=alive.peak, reached=frozenset(reached))


def encoding_bytes(model: Sdxl, resolution_px: int) -> int:
    """The most that the autoencoder has alive at once while it encodes one picture; 0 without one."""
    if model.vae is None:
        return 0
    pixels = torch.empty((1, 3, resolution_px, resolution_px), device=META)
    with torch.no_grad(), attention_of_gpus(), LiveBytes(model.vae.parameters()) as alive:
        model.encode_images(pixels)
    return alive.peak


def _loss(model: Sdxl, batch: int, resolution_px: int, *, trains_text: bool) -> Tensor:
    layout, device, dtype = model.layout, model.device, model.unet.dtype
    edge = resolution_px // model.pixels_per_latent
    tokens = torch.zeros((batch, layout.te1.context), dtype=torch.long, device=device)
    if trains_text:
        text = model.encode_text(TokenIds(tokens, tokens))
    else:
        text = TextStates(
            context=torch.zeros((*tokens.shape, layout.unet.context), dtype=dtype, device=device),
            pooled=torch.zeros((batch, layout.unet.pooled), dtype=dtype, device=device),
        )
    noised = torch.zeros((batch, layout.unet.in_channels, edge, edge), device=device)
    answer = model.denoise(
        noised.to(dtype), torch.zeros(batch, device=device), text, torch.zeros((batch, 6), device=device)
    )
    return F.mse_loss(answer.float(), noised)


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, from when they are made until they are freed.

    Saved tensors alone would not do: torch's checkpointing keeps the inputs of a block outside the graph.
    The storages of `own`, which are there before, are not counted.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in own}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, Tensor):
                self._count(result.untyped_storage())
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, nbytes).atexit = False

    def _free(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes


_plain_attention = F.scaled_dot_product_attention


@contextmanager
def attention_of_gpus() -> Iterator[None]:
    """Within, attention on the meta device keeps query, key, value, output and one float32 a row.

    That is what the flash and memory-efficient kernels on CUDA, and the one on the CPU, keep. torch itself
    would choose the plain formula, which keeps a matrix of tokens x tokens for each head. The function is
    replaced and no mode used: a mode is off while the backward pass computes a checkpointed block again.
    """
    F.scaled_dot_product_attention = _fused_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = _plain_attention


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if query.device.type != "meta":
        return _plain_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    assert not enable_gqa, "no network of SDXL shares keys between heads"
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
