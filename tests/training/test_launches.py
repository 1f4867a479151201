"""Kernel launches of a training step of the full SDXL UNet, counted on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from torch import Tensor

from spectune.files.source import TensorInfo
from spectune.model.inject import Form, Injection, inject
from spectune.model.network import Sdxl, TextStates
from spectune.sdxl.layers import Layer, build_catalogue
from spectune.sdxl.layout import SDXL
from spectune.training.denoiser import Denoiser
from spectune.training.memory.live_bytes import attention_of_gpus
from spectune.training.memory.meta_model import META, empty_frame, empty_model
from tests.launches import Launches

RANK = 64


@pytest.fixture(scope="module")
def layers(full_infos: Mapping[str, TensorInfo]) -> list[Layer]:
    return [layer for layer in build_catalogue(full_infos) if layer.part.value == "unet"]


def adapted(layers: list[Layer], form: Form) -> tuple[Sdxl, Injection]:
    model = empty_model(SDXL, torch.bfloat16)
    frames = {layer.name: empty_frame(layer, min(RANK, layer.full_rank)) for layer in layers}
    injection = inject(model, frames, form=form)
    injection.joined_factors.prepare(torch.bfloat16)
    return model, injection


def with_peft(layers: list[Layer]) -> Sdxl:
    """Return a model with PEFT's LoRA in the same layers, its factors in bf16."""
    model = empty_model(SDXL, torch.bfloat16)
    names = [layer.diffusers.removeprefix("unet.") for layer in layers]
    model.unet.set_attn_processor(AttnProcessor2_0())  # as without spectune
    model.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK // 2, target_modules=names))
    return model


def launches(model: Sdxl, before: Callable[[], object] = lambda: None) -> Launches:
    """Count a step at 1024 px with checkpointing: `before`, the forward and the backward pass."""
    denoiser = Denoiser(model, trains_text=False)
    denoiser.checkpoint_gradients()
    denoiser.train()
    text = TextStates(
        context=torch.zeros((1, 77, 2048), dtype=torch.bfloat16, device=META),
        pooled=torch.zeros((1, 1280), dtype=torch.bfloat16, device=META),
    )
    noised, ids = torch.zeros((1, 4, 128, 128), device=META), torch.zeros((1, 6), device=META)
    with attention_of_gpus(), Launches() as counted:
        before()
        out: Tensor = model.denoise(noised.bfloat16(), torch.zeros(1, device=META), text, ids)
        F.mse_loss(out.float(), noised).backward()
    return counted


@pytest.mark.slow
@pytest.mark.parametrize("form", ["delta", pytest.param("residual", marks=pytest.mark.slow)])
def test_a_step_takes_at_most_080_of_pefts_launches(layers: list[Layer], form: Form) -> None:
    peft = launches(with_peft(layers)).total
    model, injection = adapted(layers, form)
    ours = launches(model, injection.joined_factors.refresh)
    assert ours.total <= 0.8 * peft, (ours.total, peft, ours.by_name.most_common(12))
    assert all(
        tensor.grad is not None and tensor.grad.dtype is torch.float32 for tensor in injection.parameters()
    )


def test_a_refresh_takes_few_launches(layers: list[Layer]) -> None:
    _, injection = adapted(layers, "delta")
    with Launches() as counted:
        injection.joined_factors.refresh()
    assert counted.total <= 5 * 35
