"""Splits of the tiny checkpoint that many tests read and none changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from spectune.ops.split import SplitReport, split

TinySplit = Callable[[torch.dtype | None], SplitReport]


@pytest.fixture(scope="session")
def tiny_split(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TinySplit:
    """Return principal of rank 4 and residual of the tiny checkpoint for a residual dtype, cached."""

    @cache
    def make(residual_dtype: torch.dtype | None) -> SplitReport:
        folder = tmp_path_factory.mktemp("split")
        return split(tiny_checkpoint, folder, rank=4, residual_dtype=residual_dtype)

    return make
