"""Logs through the trackers of accelerate."""

from __future__ import annotations

import importlib.machinery
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image

from spectune.errors import InputError
from spectune.training.callbacks import RunStart, StepInfo, TrainReport, trackers
from spectune.training.callbacks.trackers import TrackerLog, check_trackers, tensorboard_line
from spectune.training.recipe.sections.run import Tracker
from tests.training.conftest import MakeRecipe


class Recorder:
    """A tracker that notes its calls."""

    def __init__(self, *arguments: str, **options: Any) -> None:
        self.calls: list[tuple[str, Any]] = [("init", (arguments, options))]
        RECORDERS.append(self)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> None:
            self.calls.append((name, (*arguments, *options.values())))

        return call


RECORDERS: list[Recorder] = []


def test_every_tracker_of_the_recipe_is_one_of_accelerate() -> None:
    assert set(get_args(Tracker)) == {str(name) for name in LOGGER_TYPE_TO_CLASS}


@pytest.mark.parametrize("name", get_args(Tracker))
def test_a_tracker_receives_the_run(
    name: Tracker, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, Recorder)
    log = TrackerLog(name, make_recipe())
    log.on_validation(0, 0.5)
    log.on_start(RunStart(name="t", steps=9, first_step=4, images=1, trained_parameters=1))
    log.on_step(
        StepInfo(
            step=5,
            loss=0.25,
            learning_rates={"unet": 1e-4},
            grad_norm=2.0,
            step_size={},
            seconds=1.0,
            memory_bytes=3,
            delta_norms={"unet.up": 7.0},
        )
    )
    log.on_picture(5, Image.new("RGB", (8, 4)))
    report = TrainReport(9, 4, 1.0, None, None, None, (), interrupted=False, warnings=())
    log.on_end(report)
    log.on_end(report)

    calls = RECORDERS.pop().calls
    names = [call for call, _ in calls]
    start = ["init", "start", *([] if name == "tensorboard" else ["store_init_configuration"])]
    assert names == [*start, "log", "log", "log_images", "finish"]
    arguments, options = calls[0][1]
    assert "t" in (*arguments, *options.values()) or name == "comet_ml"
    if name == "tensorboard":
        assert (arguments, options) == (("t", str(tmp_path / "out" / "logs")), {"purge_step": 5})
    logged = [values for call, values in calls if call == "log"]
    assert logged[0] == ({"loss/held_out": 0.5}, 4)
    values, step = logged[1]
    assert step == 5
    assert (values["loss/train"], values["optimizer/learning_rate_unet"], values["norm/unet.up"]) == (
        0.25,
        1e-4,
        7.0,
    )
    (images, step, *_) = next(values for call, values in calls if call == "log_images")
    assert np.shape(images["preview"])[-3:] == (4, 8, 3)


def test_a_recipe_is_stored_as_plain_values(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    log = TrackerLog("wandb", make_recipe())
    log.on_start(RunStart(name="t", steps=9, first_step=0, images=1, trained_parameters=1))
    (config,) = next(values for call, values in RECORDERS.pop().calls if call == "store_init_configuration")
    assert config["run.steps"] == 3
    assert config["data.bucket.enabled"] in ("None", "False", False)
    assert all(isinstance(value, bool | int | float | str) for value in config.values())


def test_a_missing_package_is_an_error_with_its_install_command(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.machinery.ModuleSpec("x", None)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "comet_ml" else spec)
    check_trackers(make_recipe(run={"trackers": ["wandb"]}))
    with pytest.raises(InputError, match="names comet_ml, which is not installed") as error:
        check_trackers(make_recipe(run={"trackers": ["wandb", "comet_ml"]}))
    assert "-m pip install comet-ml" in str(error.value.hint)
    monkeypatch.delitem(LOGGER_TYPE_TO_CLASS, "wandb")
    with pytest.raises(InputError, match="accelerate has no tracker wandb"):
        check_trackers(make_recipe(run={"trackers": ["wandb"]}))


def test_old_recipes_keep_their_tensorboard(make_recipe: MakeRecipe) -> None:
    assert make_recipe(run={"tensorboard": ...}).run.all_trackers == ("tensorboard",)
    assert make_recipe(run={"tensorboard": False}).run.all_trackers == ()
    both = make_recipe(run={"tensorboard": True, "trackers": ["wandb", "tensorboard"]})
    assert both.run.all_trackers == ("tensorboard", "wandb")
    with pytest.raises(InputError, match="trackers"):
        make_recipe(run={"trackers": ["os"]})


def test_the_command_for_tensorboard_can_be_pasted(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(run={"output": tmp_path / "my runs"})
    folder = (tmp_path / "my runs" / "logs").as_posix()
    assert tensorboard_line(recipe) == f'tensorboard --logdir "{folder}"'
