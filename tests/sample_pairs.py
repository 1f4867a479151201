"""Split tiny checkpoints and tuned adapters that many tests share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectune.adapters.adapter import Adapter, TunedAdapter
from spectune.adapters.reader import open_adapter
from spectune.adapters.writer import save_tuned
from spectune.checkpoints.open import open_checkpoint
from spectune.core.delta import Delta
from spectune.files.provenance import Provenance
from spectune.ops.split import SplitReport, split
from spectune.sdxl.layers import build_catalogue


def read_metadata(path: Path) -> dict[str, str]:
    with open_checkpoint(path) as source:
        return dict(source.metadata)


def changed_copy(path: Path, out: Path, changes: Mapping[str, Tensor]) -> Path:
    """Write a copy of a file, with its metadata, in which some tensors are replaced."""
    save_file(load_file(path) | dict(changes), out, metadata=read_metadata(path))
    return out


def recast(path: Path, out: Path, dtype: torch.dtype) -> Path:
    """Write a copy with all floating-point tensors in another dtype."""
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in load_file(path).items()}
    save_file(tensors, out, metadata=read_metadata(path))
    return out


def small_split(
    base: Path, folder: Path, *, rank: int = 4, residual_dtype: torch.dtype | None = None
) -> SplitReport:
    return split(base, folder, rank=rank, residual_dtype=residual_dtype)


def open_principal(base: Path, path: Path) -> Adapter:
    with open_checkpoint(base) as source:
        opened = open_adapter(path, build_catalogue(source, all_layers=True))
    assert isinstance(opened, Adapter)
    return opened


def random_delta(delta: Delta, size: float, seed: int) -> Delta:
    """Return the same frame with a random change of `size` times the standard deviation of the factors."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator) * (size * float(like.float().std()))

    return Delta(frame=delta.frame, down=noise(delta.frame.down), up=noise(delta.frame.up))


def tuned_from(base: Path, report: SplitReport, *, size: float, only: str = "") -> TunedAdapter:
    """Return a tuned adapter on the frame of a principal; size 0 is the state before the first step."""
    principal = open_principal(base, report.principal)
    deltas = {
        name: random_delta(Delta(principal.layers[name], torch.empty(0), torch.empty(0)), size, seed)
        for seed, name in enumerate(principal.layers)
        if name.startswith(only)
    }
    provenance = Provenance(
        base_hash=report.base_hash, principal_hash=report.principal_hash, prediction="flow", flow_shift=2.5
    )
    return TunedAdapter(deltas, provenance.to_metadata() | {"spectune.role": "tuned"}, "tuned.safetensors")


def saved_tuned(tuned: TunedAdapter, path: Path) -> Path:
    save_tuned(path, tuned, tuned.provenance)
    return path
