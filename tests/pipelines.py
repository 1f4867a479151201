"""Folders saved by diffusers, and helpers to read them without spectune's tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from spectune.files.source import TensorInfo, WeightSource
from spectune.sdxl.vocabulary import EOS, tokenizer_files
from tests.layouts import Modules

CLASSES: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "vae": AutoencoderKL,
}


def save_pipeline(modules: Modules, folder: Path) -> Path:
    """Write a folder with `StableDiffusionXLPipeline.save_pretrained`, in float32."""
    vae = cast(AutoencoderKL, modules.vae)
    vae.register_to_config(scaling_factor=0.13025)
    # the tokenizers are added as files below
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=cast(Any, modules.te1),
        text_encoder_2=cast(Any, modules.te2),
        tokenizer=cast(Any, None),
        tokenizer_2=cast(Any, None),
        unet=cast(Any, modules.unet),
        scheduler=cast(
            Any, EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        ),
    )
    pipeline.save_pretrained(folder)
    for name, pad in (("tokenizer", EOS), ("tokenizer_2", "!")):
        (folder / name).mkdir()
        for path, raw in tokenizer_files(name, pad=pad, context=77).items():
            (folder / path).write_bytes(raw)
    edit_json(folder / "model_index.json", tokenizer=["transformers", "CLIPTokenizer"])
    edit_json(folder / "model_index.json", tokenizer_2=["transformers", "CLIPTokenizer"])
    return folder


def edit_json(path: Path, **changes: object) -> None:
    """Set entries of a JSON file; None is null."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})


def loaded(folder: Path, name: str) -> nn.Module:
    """Load a module with its library; fail if a tensor is missing or ignored."""
    module, info = CLASSES[name].from_pretrained(folder, subfolder=name, output_loading_info=True)
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    return module


def infos_of(source: WeightSource) -> list[TensorInfo]:
    return list(source.tensors.values())


def same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
