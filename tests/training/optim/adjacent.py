"""Parameters in memory as model/joined_factors.py arranges them: those of one shape follow each other."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectune.files.source import TensorInfo
from spectune.model.joined_factors import JoinedFactors
from spectune.sdxl.layers import build_catalogue
from spectune.training.optim import stacks
from spectune.training.state import trained_tensors

SHAPES = [(4, 40), (40, 4), (4, 40), (3, 5, 3, 3), (40, 4), (4, 40), (7, 4), (3, 5, 3, 3)]


def tensors(dtype: torch.dtype = torch.float32, start: float = 1.0) -> list[nn.Parameter]:
    """Return parameters of SHAPES."""
    generator = torch.Generator().manual_seed(0)
    values = [(start * torch.randn(shape, generator=generator)).to(dtype) for shape in SHAPES]
    return adjacent([nn.Parameter(value) for value in values])


def adjacent(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Move parameters of one shape next to each other."""
    for shape in dict.fromkeys(p.shape for p in parameters):
        alike = [p for p in parameters if p.shape == shape]
        for p, view in zip(alike, torch.stack([p.detach() for p in alike]), strict=True):
            p.data = view
    return parameters


def two_groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    half = len(parameters) // 2
    return [{"params": parameters[:half], "part": "te1"}, {"params": parameters[half:], "part": "unet"}]


def train(
    optimizer: Any,
    parameters: list[nn.Parameter],
    steps: range,
    *,
    frozen: int | None = None,
    pull: float = 1.0,
) -> None:
    """Step with random gradients, plus `pull` times the parameter; the parameter `frozen` gets none."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for index, p in enumerate(parameters):
            noise = torch.randn(p.shape, generator=generator)
            p.grad = None if index == frozen else (pull * p.detach().float() + 0.3 * noise - 0.5).to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()


def small_sdxl(
    full_infos: Mapping[str, TensorInfo], monkeypatch: pytest.MonkeyPatch
) -> dict[str, nn.Parameter]:
    """Return all trained tensors of SDXL, with one small size for each size of the real ones.

    Stacks have as many tensors as those of the real size, at rank 64 in float32.
    """
    sizes: dict[int, int] = {}
    real: dict[torch.Size, Tensor] = {}
    layers: dict[str, Any] = {}
    for layer in build_catalogue(full_infos):
        out, inside, *kernel = layer.shape
        rank = min(64, layer.full_rank)
        large = (rank, inside, *kernel), (out, rank)
        out, inside = (sizes.setdefault(size, 2 + len(sizes)) for size in (out, inside))
        down, up = torch.zeros(32, inside, *kernel), torch.zeros(out, 32, *[1] * len(kernel))
        for small, shape in zip((down, up), large, strict=True):
            real[small.shape] = torch.empty(shape, device="meta")
        layers[layer.name] = SimpleNamespace(
            form="delta",
            scale=1.0,
            frame_down=down,
            frame_up=up,
            down=nn.Parameter(down.clone()),
            up=nn.Parameter(up.clone()),
        )
    plain = stacks.most_members
    monkeypatch.setattr(stacks, "most_members", lambda p: plain(real[p.shape]))
    JoinedFactors([*layers.values()]).refresh()
    return trained_tensors({name: (layer.down, layer.up) for name, layer in layers.items()})
