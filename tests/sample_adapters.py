"""Adapter files in memory, as written by spectune and by other programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from spectune.sdxl.layers import Layer

Tensors = dict[str, Tensor]


def pair(layer: Layer, rank: int = 2, alpha: float | None = None) -> Tensors:
    """Return the three tensors of a layer; alpha is the rank by default."""
    down, up = layer.factor_shapes(rank)
    return {
        f"{layer.kohya}.lora_down.weight": torch.randn(down),
        f"{layer.kohya}.lora_up.weight": torch.randn(up),
        f"{layer.kohya}.alpha": torch.tensor(float(rank if alpha is None else alpha)),
    }


def pairs(layers: Iterable[Layer], rank: int = 2) -> Tensors:
    return {key: tensor for layer in layers for key, tensor in pair(layer, rank).items()}


def without(tensors: Mapping[str, Tensor], end: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(end)}


def kohya_style(layer: Layer) -> str:
    """Return the stem of a layer in trainers that use the diffusers UNet."""
    return "lora_" + layer.diffusers.replace(".", "_")


def renamed(tensors: Mapping[str, Tensor], old: str, new: str) -> Tensors:
    """Rename one stem."""
    return {
        new + key.removeprefix(old) if key.startswith(f"{old}.") else key: tensor
        for key, tensor in tensors.items()
    }


def as_peft(tensors: Mapping[str, Tensor], layers: Iterable[Layer]) -> Tensors:
    """Rename some layers as in PEFT and diffusers, and remove their alphas."""
    changed = dict(tensors)
    for layer in layers:
        for kohya, peft in (("lora_down", "lora_A"), ("lora_up", "lora_B")):
            changed[f"{layer.diffusers}.{peft}.weight"] = changed.pop(f"{layer.kohya}.{kohya}.weight")
        del changed[f"{layer.kohya}.alpha"]
    return changed


def as_tuned(tensors: Mapping[str, Tensor]) -> Tensors:
    """Change the suffixes to those of a tuned file."""
    changed: Tensors = {}
    for key, tensor in tensors.items():
        stem, _, suffix = key.partition(".")
        for kind in ("frame", "delta") if suffix != "alpha" else ("",):
            changed[f"{stem}.{suffix.replace('lora', kind)}"] = tensor
    return changed
