"""LoRA files of other programs, and what they add to each layer, computed without spectune's code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectune.sdxl.layers import Layer


def lora_tensors(
    layers: Iterable[Layer],
    *,
    rank: int = 3,
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    size: float = 0.1,
) -> dict[str, Tensor]:
    """Return random factors with kohya keys; alpha is the rank by default."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        for side, shape in zip(("down", "up"), layer.factor_shapes(rank), strict=True):
            numbers = size * torch.randn(shape, generator=generator)
            tensors[f"{layer.kohya}.lora_{side}.weight"] = numbers.to(dtype)
        tensors[f"{layer.kohya}.alpha"] = torch.tensor(float(rank if alpha is None else alpha))
    return tensors


def saved_lora(
    path: Path,
    layers: Iterable[Layer],
    *,
    rank: int = 3,
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    size: float = 0.1,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    tensors = lora_tensors(layers, rank=rank, alpha=alpha, dtype=dtype, seed=seed, size=size)
    save_file(tensors, path, metadata=dict(metadata or {}))
    return path


def products(path: Path) -> dict[str, Tensor]:
    """Return alpha / rank * up @ down in float64 for every stem of a file with kohya keys."""
    file = load_file(path)
    result: dict[str, Tensor] = {}
    for key, alpha in file.items():
        stem, _, suffix = key.partition(".")
        if suffix != "alpha":
            continue
        up, down = (file[f"{stem}.lora_{side}.weight"].flatten(1).double() for side in ("up", "down"))
        result[stem] = float(alpha) / down.shape[0] * (up @ down)
    return result


def distance(actual: Tensor, expected: Tensor) -> float:
    """Return the Frobenius norm of the difference, relative to the norm of the expected tensor."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether both have the same names with the same dtypes, shapes and bits."""
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


def same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
