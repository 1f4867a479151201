from __future__ import annotations

import torch
from torch import nn


def trained(shape: tuple[int, int] = (64, 80), dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """Deltas as training finds them: zeros, of two parts."""
    return {
        name: nn.Parameter(torch.zeros(shape, dtype=dtype))
        for name in ("unet.a.down", "unet.a.up", "te1.b.down")
    }


def gradients_of_noise(tensors: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        tensor.grad = torch.randn(tensor.shape, generator=generator)
    torch.manual_seed(seed)


def advance(optimizer: torch.optim.Optimizer, tensors: dict[str, nn.Parameter], seeds: range) -> None:
    for seed in seeds:
        gradients_of_noise(tensors, seed)
        optimizer.step()
