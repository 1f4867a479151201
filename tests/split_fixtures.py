"""Splits of the tiny checkpoint that many tests read and no test changes."""

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
    """Return a cached function that splits the tiny checkpoint at rank 4 for a residual dtype."""

    @cache
    def make(residual_dtype: torch.dtype | None) -> SplitReport:
        folder = tmp_path_factory.mktemp("split")
        return split(tiny_checkpoint, folder, rank=4, residual_dtype=residual_dtype)

    return make
