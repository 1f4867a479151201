from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spectune.errors import InputError
from spectune.training import state
from spectune.training.callbacks import Callbacks, StepInfo
from spectune.training.loop import train
from spectune.training.resume import changes
from tests.training.conftest import MakeRecipe
from tests.training.test_state import header, trained_pair


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    trained, optimizer = trained_pair("adamw")
    state.save_state(tmp_path / "t.state", header(), trained, optimizer)
    saved = state.load_state(tmp_path / "t.state")

    assert changes.check_continues(saved, header(recipe={"run": {"batch": 2, "steps": 99}})) == []
    assert "their order changes from here on" in changes.check_continues(saved, header(data_hash="x"))[0]
    state.save_state(tmp_path / "t.state", header(batches_per_step=4), trained, optimizer)
    of_four = state.load_state(tmp_path / "t.state")
    (warning,) = changes.check_continues(of_four, header(batches_per_step=2))
    assert warning.startswith("an optimizer step had 4 batches and now has 2: run.accumulation times")
    assert changes.check_continues(of_four, header(batches_per_step=4)) == []
    with pytest.raises(InputError, match=r"run\.batch was 2 and is now 4"):
        changes.check_continues(saved, header(recipe={"run": {"batch": 4, "steps": 10}}))
    with pytest.raises(InputError, match="base was bbbbbbbbbbbbbbbb and is now 0000000000000000"):
        changes.check_continues(saved, header(base_hash="0" * 64))
    with pytest.raises(InputError, match="frames were ffffffffffff and are now 000000000000"):
        changes.check_continues(saved, header(frame_hash="0" * 64))


@pytest.mark.parametrize(("schedule", "count"), [("constant", 0), ("cosine", 1)])
def test_another_number_of_steps_with_a_schedule_is_a_warning(
    tmp_path: Path, schedule: str, count: int
) -> None:
    trained, optimizer = trained_pair("adamw")
    recipe = {"optimizer": {"schedule": schedule}}
    state.save_state(tmp_path / "t.state", header(recipe=recipe), trained, optimizer)
    saved = state.load_state(tmp_path / "t.state")

    warnings = changes.check_continues(saved, header(recipe=recipe, steps=20))
    assert len(warnings) == count
    assert all(f"the run had 10 steps and now has 20: its {schedule} schedule" in text for text in warnings)
    assert changes.check_continues(saved, header(recipe=recipe)) == []


class Log(Callbacks):
    """The messages of a run and the learning rate of each step."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.rates: dict[int, dict[str, float]] = {}

    def on_message(self, text: str) -> None:
        self.messages.append(text)

    def on_step(self, info: StepInfo) -> None:
        self.rates[info.step] = dict(info.learning_rates)


@pytest.mark.parametrize(
    "key",
    [
        "run.save_every_epochs",
        "run.preview.steps",
        "optimizer.part_learning_rates.te1",
        "optimizer.warmup_share",
    ],
)
def test_settings_of_the_same_kind_may_change(key: str) -> None:
    assert changes.Change(key, None, 1).is_free


@pytest.mark.parametrize(
    "key", ["run.batch", "run.seed", "optimizer.name", "optimizer.options.eps", "model.rank"]
)
def test_settings_that_change_the_training_may_not(key: str) -> None:
    assert not changes.Change(key, None, 1).is_free


def test_a_lower_rate_is_applied_printed_and_recorded(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    cosine = {"name": "adamw", "learning_rate": 1e-2, "schedule": "cosine"}
    train(make_recipe(run={"steps": 2}, optimizer=cosine))
    log = Log()
    lower = {"name": "adamw", "learning_rate": 1e-3, "part_learning_rates": {"unet": 5e-4}}
    train(make_recipe(run={"steps": 3, "save_every_steps": 9}, optimizer=lower), callbacks=[log])

    assert log.rates == {3: {"unet": 5e-4, "te1": 1e-3, "te2": 1e-3}}
    start = log.messages.index("resuming after step 2 from t-step00000002.state")
    assert log.messages[start + 1 : start + 7] == [
        "  optimizer.learning_rate: 0.01 -> 0.001",
        "  optimizer.part_learning_rates.unet: 0.01 (optimizer.learning_rate) -> 0.0005",
        '  optimizer.schedule: "cosine" -> "constant"',
        "  run.save_every_steps: not set -> 9",
        "  run.steps: 2 -> 3",
        "  learning rate in the next step: unet 0 -> 0.0005, te1 0 -> 0.001, te2 0 -> 0.001",
    ]
    document = json.loads((tmp_path / "out" / "t-step00000003.state" / state.STATE).read_text())
    assert document["changes"][0] == {
        "step": 2,
        "key": "optimizer.learning_rate",
        "before": 1e-2,
        "after": 1e-3,
    }
    assert len(document["changes"]) == 5


def test_a_schedule_free_optimizer_gets_the_new_rate(make_recipe: MakeRecipe) -> None:
    free: dict[str, Any] = {"name": "adamw_schedule_free", "learning_rate": 1e-2}
    train(make_recipe(run={"steps": 1}, optimizer=free))
    log = Log()
    train(make_recipe(run={"steps": 2}, optimizer=free | {"learning_rate": 1e-3}), callbacks=[log])
    assert set(log.rates[2].values()) == {1e-3}
    assert any("the new rate applies from the next step" in text for text in log.messages)
