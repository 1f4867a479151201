"""Memory for one tile at a time, used again and again.

A fresh megabyte costs more than filling it: the system hands out pages one by one, and a checkpoint has ten
thousand tiles. Each thread has its own.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_local = threading.local()


def scratch(use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor, whose numbers last until this thread asks for the same use again."""
    kept: dict[tuple[str, torch.dtype], Tensor] = _local.__dict__.setdefault("kept", {})
    numel = 1
    for length in shape:
        numel *= length
    flat = kept.get((use, dtype))
    if flat is None or flat.numel() < numel:
        flat = kept[use, dtype] = torch.empty(numel, dtype=dtype)
    return flat[:numel].view(shape)


def converted(use: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in scratch memory, in another type."""
    return scratch(use, tuple(tensor.shape), dtype).copy_(tensor)
