"""What is due after a step: by steps, by epochs, by the clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from spectune.training.callbacks import Callbacks
from spectune.training.loop import train
from spectune.training.recipe.recipe import Recipe
from spectune.training.saving import intervals
from spectune.training.saving.intervals import SaveClock, agreed, is_due
from tests.training.conftest import MakeRecipe


def steps_due(
    recipe: Recipe, batches_per_epoch: int, *, processes: int = 1, steps: int = 12
) -> dict[str, list[int]]:
    """Return the steps after which each task is due."""
    batches_per_step = recipe.run.accumulation * processes
    span = (batches_per_epoch, batches_per_step)
    tasks: tuple[intervals.Task, ...] = ("save", "validate", "preview")
    return {
        task: [
            step
            for step in range(1, steps + 1)
            if is_due(recipe.run, task, step=step, position=step * batches_per_step, span=span)
        ]
        for task in tasks
    }


def test_steps_and_epochs_are_due_together(make_recipe: MakeRecipe) -> None:
    run = {
        "save_every_steps": 4,
        "save_every_epochs": 1,
        "validate_every_epochs": 2,
        "preview_every_steps": 5,
    }
    assert steps_due(make_recipe(run=run), 3) == {
        "save": [3, 4, 6, 8, 9, 12],
        "validate": [6, 12],
        "preview": [5, 10],
    }


@pytest.mark.parametrize(
    ("accumulation", "processes", "batches_per_epoch", "due"),
    [
        (2, 1, 5, [3, 5, 8, 10]),  # epochs end after 2.5, 5, 7.5 and 10 steps
        (2, 3, 4, list(range(1, 13))),  # a step takes more than one epoch
        (1, 4, 10, [3, 5, 8, 10]),
        (1, 1, 4, [4, 8, 12]),
    ],
)
def test_an_epoch_ends_with_the_step_that_takes_its_last_batch(
    accumulation: int, processes: int, batches_per_epoch: int, due: list[int], make_recipe: MakeRecipe
) -> None:
    recipe = make_recipe(run={"accumulation": accumulation, "save_every_epochs": 1})
    assert steps_due(recipe, batches_per_epoch, processes=processes)["save"] == due


class Clock:
    """A clock that each step moves on by a number of seconds."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_the_clock_counts_from_the_last_save() -> None:
    now = Clock()
    clock, off = SaveClock(30, now=now), SaveClock(0, now=now)
    now.time = 1799
    assert not clock.is_due
    now.time = 1800
    assert clock.is_due
    assert not off.is_due
    assert not SaveClock(None, now=now).is_due
    clock.restart()
    assert not clock.is_due


class Saves(Callbacks):
    """Moves a clock by 25 minutes at each step, and notes what is saved."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.adapters: list[int] = []
        self.states: list[int] = []
        self.messages: list[str] = []

    def on_step(self, info: object) -> None:
        self.clock.time += 25 * 60

    def on_save(self, step: int, file: Path) -> None:
        self.adapters.append(step)

    def on_state(self, step: int, folder: Path) -> None:
        self.states.append(step)

    def on_message(self, text: str) -> None:
        self.messages.append(text)


@pytest.mark.slow
def test_a_run_saves_its_state_by_the_clock_with_the_same_result(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(intervals, "SaveClock", SaveClock)
    monkeypatch.setattr("spectune.training.loop.SaveClock", lambda minutes: SaveClock(minutes, now=clock))
    saves = Saves(clock)
    keys: dict[str, Any] = {"steps": 6, "save_every_steps": 4, "keep_last": 9}
    train(make_recipe(run=keys | {"output": tmp_path / "a", "save_every_minutes": 30}), callbacks=[saves])
    train(make_recipe(run={"steps": 6, "output": tmp_path / "b", "save_every_minutes": 0}))
    # 50 minutes after the start, the save by steps, and 50 minutes after that: the end
    assert (saves.adapters, saves.states) == ([4, 6], [2, 4, 6])
    assert (tmp_path / "a" / "t.safetensors").read_bytes() == (tmp_path / "b" / "t.safetensors").read_bytes()


class Processes:
    """Several processes, of which the others want the same as this one."""

    num_processes = 2
    device = torch.device("cpu")

    def __init__(self, *, others: tuple[float, float], is_main_process: bool) -> None:
        self.others, self.is_main_process = torch.tensor(others), is_main_process
        self.reads = 0

    def reduce(self, tensor: torch.Tensor, *, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        self.reads += 1
        return tensor + self.others


@pytest.mark.parametrize(
    ("others", "is_main", "save", "expected"),
    [
        ((0, 0), True, True, (False, True)),
        ((0, 0), False, True, (False, False)),  # only the clock of the main process counts
        ((0, 1), False, False, (False, True)),
        ((1, 0), True, False, (True, False)),  # a signal to any process stops all
    ],
)
def test_processes_agree(
    others: tuple[float, float], is_main: bool, save: bool, expected: tuple[bool, bool]
) -> None:
    accelerator = Processes(others=others, is_main_process=is_main)
    assert agreed(cast("Any", accelerator), stop=False, save=save) == expected
    assert accelerator.reads == 1
