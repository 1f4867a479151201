"""A split on a GPU computes on the CPU while other tensors wait for the GPU."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from spectune.files.source import MemorySource
from spectune.pairs.split_tensor import SplitPlan

split: Any = importlib.import_module("spectune.ops.split")


@pytest.mark.parametrize(("device", "workers"), [("cpu", 0), (torch.device("cpu"), 0), ("cuda:1", 2)])
def test_a_split_on_a_gpu_has_workers_that_wait_for_it(
    device: torch.device | str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        split, "run_pipeline", lambda *_, waiting_workers, size: asked.append(waiting_workers)
    )
    plan = SplitPlan({}, torch.float16, device=device)
    unused: Any = None
    split._TensorSplitter(MemorySource({}, {}), unused, plan, unused, None, None).run()
    assert asked == [workers]
