"""The announced disk space of saves, and the space that they take."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from spectune.training import loop
from spectune.training.loop import train
from spectune.training.saving.disk import SavePlan, disk_warnings, plan_saves
from tests.training.conftest import MakeRecipe


def tensor_bytes(file: Path) -> int:
    """Return the bytes after the header: the tensors of the tiny model are small."""
    raw = file.read_bytes()
    return len(raw) - 8 - int.from_bytes(raw[:8], "little")


@pytest.mark.parametrize(
    "keys",
    [
        {"model": {"form": "delta"}, "run": {"ema_decay": 0.9}},
        {
            "model": {"form": "residual"},
            "optimizer": {"name": "prodigy_plus_schedule_free", "learning_rate": ...},
        },
    ],
)
def test_announced_sizes_are_those_of_the_files(
    keys: dict[str, dict[str, Any]], make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[SavePlan] = []

    def plan(*args: Any) -> SavePlan:
        plans.append(plan_saves(*args))
        return plans[0]

    monkeypatch.setattr(loop, "plan_saves", plan)
    run = {"steps": 2, "save_every_steps": 1, "keep_last": 1, **keys.get("run", {})}
    train(make_recipe(**{**keys, "run": run}))
    found = plans[0]
    adapter = tensor_bytes(tmp_path / "out" / "t.safetensors")
    state = sum(map(tensor_bytes, (tmp_path / "out" / "t-step00000002.state").glob("*.safetensors")))
    assert (found.adapters, found.states) == (2, 2)
    assert found.adapter_bytes == pytest.approx(adapter, rel=0.02)  # alphas are not counted
    assert found.state_bytes == pytest.approx(state, rel=0.02)


def test_a_plan_is_described() -> None:
    assert str(SavePlan(3, 500_000_000, 4, 2_000_000_000)) == (
        "3 adapters of 500.0 MB and up to 4 states of 2.0 GB, together 9.5 GB"
    )
    assert str(SavePlan(1, 10_000, 1, 20_000)).startswith("1 adapter of 0.0 MB and 1 state of 0.0 MB")


def test_a_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 3_000_000_000))
    plan = SavePlan(3, 500_000_000, 4, 2_000_000_000)
    (warning,) = disk_warnings(plan, tmp_path / "not yet" / "there")
    assert "the saves need 9.5 GB" in warning
    assert "has 3.0 GB free" in warning
    assert disk_warnings(SavePlan(1, 1, 1, 1), tmp_path) == []
