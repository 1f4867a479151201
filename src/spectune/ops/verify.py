"""Verifying that a residual and a principal file are a checkpoint file."""

from __future__ import annotations

from pathlib import Path

from spectune.adapters.adapter import Adapter
from spectune.adapters.reader import open_adapter
from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.pipeline import Progress
from spectune.pairs.comparison import VerifyReport, verify
from spectune.sdxl.layers import build_catalogue


def verify_files(
    model: Path, residual: Path, principal: Path, *, progress: Progress | None = None
) -> VerifyReport:
    """Compare `model` with what `residual` and `principal` make together. Progress counts tensors."""
    with (
        open_checkpoint(model) as source,
        open_checkpoint(residual) as rest,
        open_adapter(principal, build_catalogue(source, all_layers=True)) as opened,
    ):
        if not isinstance(opened, Adapter):
            raise InputError(
                f"{opened.label} is a tuned adapter: expected a principal",
                hint="pass the principal that `split` wrote",
            )
        return verify(source, rest, opened, progress=progress)
