"""A log of scalars and previews for TensorBoard, Weights & Biases and the other trackers of accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image

from spectune.errors import InputError, quoted
from spectune.model.device import pip_install
from spectune.training.callbacks import Callbacks, RunStart, StepInfo, TrainReport
from spectune.training.recipe.recipe import Recipe
from spectune.training.recipe.sections.run import Tracker

_PROJECT = "spectune"
_LIST_OF_IMAGES = ("wandb", "swanlab")  # the others take one image


def check_trackers(recipe: Recipe) -> None:
    """Raise InputError if a tracker of the recipe is not installed."""
    for name in recipe.run.all_trackers:
        if find_spec(name) is None:
            remove = "run.tensorboard = false" if name == "tensorboard" else f"run.trackers without {name}"
            raise InputError(
                f"run.trackers names {name}, which is not installed",
                hint=f"{pip_install()} {name.replace('_', '-')}, or set {remove}",
            )
        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(
                f"the installed accelerate has no tracker {name}", hint=f"{pip_install()} -U accelerate"
            )


def log_folder(recipe: Recipe) -> Path:
    """Return the folder of the logs of a run."""
    return recipe.run.output / "logs"


def tensorboard_line(recipe: Recipe) -> str:
    """Return the command that shows the log of a run, to paste into the terminal of this system."""
    return f"tensorboard --logdir {quoted(log_folder(recipe))}"


class TrackerLog(Callbacks):
    """Logs a run with one tracker. In TensorBoard, a resumed run replaces entries after its first step."""

    def __init__(self, name: Tracker, recipe: Recipe) -> None:
        self.name: Tracker = name
        self.recipe = recipe
        self._tracker: Any = None
        self._before: float | None = None

    def on_start(self, start: RunStart) -> None:
        arguments, options = _arguments(self.name, self.recipe, start.first_step)
        self._tracker = LOGGER_TYPE_TO_CLASS[self.name](*arguments, **options)
        if hasattr(self._tracker, "start"):  # before accelerate 1.8, the constructor starts it
            self._tracker.start()
        if self.name != "tensorboard":  # which would show the recipe as a second run
            self._tracker.store_init_configuration(_flat(self.recipe.model_dump(mode="json")))
        if self._before is not None:
            self._log({"loss/held_out": self._before}, start.first_step)

    def on_step(self, info: StepInfo) -> None:
        values: dict[str, float] = {
            "loss/train": info.loss,
            "optimizer/grad_norm": info.grad_norm,
            "speed/seconds_per_step": info.seconds,
            "speed/memory_bytes": info.memory_bytes,
        }
        values |= {f"optimizer/learning_rate_{part}": rate for part, rate in info.learning_rates.items()}
        values |= {f"optimizer/d_{part}": size for part, size in info.step_size.items()}
        values |= {f"norm/{name}": norm for name, norm in info.delta_norms.items()}
        self._log(values, info.step)

    def on_validation(self, step: int, loss: float) -> None:
        if self._tracker is None:
            self._before = loss
        self._log({"loss/held_out": loss}, step)

    def on_picture(self, step: int, sheet: Image.Image) -> None:
        if not hasattr(self._tracker, "log_images"):
            return
        picture = np.asarray(sheet.convert("RGB"))
        if self.name == "tensorboard":
            self._tracker.log_images({"preview": picture[None]}, step=step, dataformats="NHWC")
        else:
            several = self.name in _LIST_OF_IMAGES
            self._tracker.log_images({"preview": [picture] if several else picture}, step=step)

    def on_end(self, report: TrainReport) -> None:
        if self._tracker is not None:
            self._tracker.finish()
            self._tracker = None

    def _log(self, values: Mapping[str, float], step: int) -> None:
        if self._tracker is not None:
            self._tracker.log(dict(values), step=step)


def _arguments(name: Tracker, recipe: Recipe, first_step: int) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the arguments and options of a tracker's class: project or folder, and name of the run."""
    run, logs = recipe.run, str(log_folder(recipe))
    match name:
        case "tensorboard":
            return (run.name, logs), {"purge_step": first_step + 1 if first_step else None}
        case "aim":
            return (run.name, logs), {}
        case "dvclive":
            return (run.name,), {"dir": str(log_folder(recipe) / "dvclive")}
        case "wandb":
            return (_PROJECT,), {"name": run.name, "dir": str(run.output)}
        case "trackio":
            return (_PROJECT,), {"name": run.name}
        case "mlflow":
            return (_PROJECT,), {"run_name": run.name}
        case "clearml":
            return (_PROJECT,), {"task_name": run.name}
        case "swanlab":
            return (_PROJECT,), {"experiment_name": run.name}
        case "comet_ml":
            return (_PROJECT,), {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Return nested values as one level: `{"run.steps": 20}`. Trackers take plain values only."""
    result: dict[str, bool | int | float | str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= _flat(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            result[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return result
