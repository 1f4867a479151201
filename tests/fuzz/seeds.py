"""Valid files that the targets start from. They are made once for each process."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from spectune.files.source import MemorySource
from spectune.sdxl.layers import Layer, build_catalogue
from spectune.sdxl.layout import hints_metadata
from tests.layouts import TINY, build_modules
from tests.loras import lora_tensors

# A small vocabulary, so that a model has 1 MB.
LAYOUT = replace(TINY, te1=replace(TINY.te1, vocab=100), te2=replace(TINY.te2, vocab=100))
METADATA = {
    "spectune.role": "model",
    "spectune.prediction": "v",
    "spectune.noise_schedule": "zero_terminal_snr",
    "spectune.vae_scale": "0.13025",
    "spectune.base_name": "base.safetensors",
    "modelspec.prediction_type": "v",
    "ss_v_parameterization": "True",
    "ss_network_args": '{"algo": "loha", "conv_dim": "4"}',
    "ss_tag_frequency": '{"2_shape": {"red": 3, "round": 1}}',
    "ss_network_dim": "4",
    "ss_network_alpha": "2.0",
    "ss_base_model_version": "sdxl_base_v1-0",
    "lora_adapter_metadata": '{"r": 4, "lora_alpha": 4, "rank_pattern": {"a": 2}, "alpha_pattern": {}}',
    "format": "pt",
}


@cache
def model_tensors() -> Mapping[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tensors = build_modules(LAYOUT).single_file()
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


@cache
def model() -> bytes:
    """Return a tiny SDXL as a safetensors file."""
    return save(dict(model_tensors()), metadata=hints_metadata(LAYOUT))


@cache
def layers() -> tuple[Layer, ...]:
    """Return layers of the tiny SDXL, of the UNet and both text encoders, that SDXL also has."""
    catalogue = build_catalogue(MemorySource(model_tensors(), hints_metadata(LAYOUT)))
    names = ("te1.", "te2.", "unet.input_blocks.1.0.in_layers", "unet.middle_block.1.proj_in")
    chosen = [[layer for layer in catalogue.layers if layer.name.startswith(name)][:2] for name in names]
    return tuple(layer for found in chosen for layer in found)


@cache
def lora() -> bytes:
    """Return a LoRA of the tiny SDXL with kohya keys and metadata."""
    return save(lora_tensors(layers(), rank=2, dtype=torch.float16), metadata=METADATA)


@cache
def small_file() -> bytes:
    """Return a safetensors file with tensors of several dtypes, one of them empty."""
    tensors = {
        "a.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
        "b": torch.tensor(1.5, dtype=torch.bfloat16),
        "c": torch.zeros(0, 4, dtype=torch.float16),
        "d.8": torch.ones(5).to(torch.float8_e4m3fn),
        "é": torch.tensor([1, 2], dtype=torch.int64),
    }
    return save(tensors, metadata={"format": "pt", "spectune.role": "model"})


@cache
def folder() -> Path:
    """Return a folder for files that are made once. It is deleted with the process."""
    keeper = tempfile.TemporaryDirectory(prefix="spectune-fuzz-")
    _KEPT.append(keeper)
    return Path(keeper.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []
