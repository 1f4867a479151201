"""The benchmark of file stages: medians, ratios to the copy of the same run, the largest peak."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("benchmarks.files")


def test_ratios_compare_a_stage_with_the_copy_of_the_same_run(bench: Any) -> None:
    def cost(seconds: float, faults: int = 10, peak: float = 0.5) -> Any:
        return bench.Cost(seconds, seconds * 1.5, seconds / 4, faults, int(peak * 1e9))

    # the second run met a slow disk: the stage and the copy took twice as long
    rows = bench.table(
        {
            "split": [cost(40)],
            "copy": [cost(10), cost(20), cost(8)],
            "verify": [cost(15, 2000), cost(30, 1000), cost(16, 3000, peak=0.8)],
        }
    ).splitlines()
    assert rows[2] == "| split | 40.0 | 60.0 | 10.0 | 4.00 | 4.00 to 4.00 | 10 | 0.50 GB |"
    assert rows[4] == "| verify | 16.0 | 24.0 | 4.0 | 1.50 | 1.50 to 2.00 | 2,000 | 0.80 GB |"


def test_the_cost_of_a_stage_counts_its_memory(bench: Any) -> None:
    kept: list[bytearray] = []

    def stage() -> None:
        kept.append(bytearray(b"x" * (64 << 20)))
        time.sleep(0.12)  # the memory is sampled every 0.05 s

    cost = bench.cost_of(stage)
    assert cost.seconds >= 0.12
    assert cost.peak_bytes > 64 << 20
