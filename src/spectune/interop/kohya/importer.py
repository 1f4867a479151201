"""Convert a kohya command to a recipe, with a result for each flag."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, cast

from spectune.errors import InputError
from spectune.interop.kohya import derived
from spectune.interop.kohya.command_line import LAUNCHER, Command, Flag, check_flags
from spectune.interop.kohya.flags import DEFAULTS, convert_flag
from spectune.interop.kohya.rules import FlagResult, PathText
from spectune.training.objective.losses import HUBER_LOSSES
from spectune.training.recipe.commented import Setting, nested
from spectune.training.recipe.recipe import parse_recipe
from spectune.training.recipe.sections.model import ALL_PARTS

# A learning rate this small changes no weight. Step 3 of the guide uses 1e-24.
TRAINS_NOTHING = 1e-12


@dataclass(frozen=True)
class ImportedRecipe:
    """The settings of a recipe, and the result of every flag of the command."""

    results: tuple[FlagResult, ...]
    settings: tuple[Setting, ...]
    notes: tuple[str, ...]

    @property
    def understood(self) -> bool:
        """Return whether every flag was imported or has no effect in spectune."""
        model_is_known = all(
            setting.source != _TO_DO or not setting.key.startswith("model.") for setting in self.settings
        )
        return model_is_known and all(result.verdict in ("taken", "ignored") for result in self.results)


def import_command(command: Command, *, folder: Path) -> ImportedRecipe:
    """Convert a command to a recipe for a file in `folder`. Relative paths are rebased to `folder`.

    Raises:
        InputError: The command names no model, or its values do not form a valid recipe.
    """
    check_flags(command)
    if command.value("pretrained_model_name_or_path") is None and command.is_complete:
        raise InputError(
            "the command names no model", hint="add --pretrained_model_name_or_path, the checkpoint to train"
        )
    complete = with_defaults(command)
    results = _without_conflicts(_results(complete))
    settings = [
        Setting(key, rebased(value, folder), _source(result, first=place == 0))
        for result in results
        if result.verdict == "taken"
        for place, (key, value) in enumerate(result.settings.items())
    ]
    settings = list({setting.key: setting for setting in reversed(settings)}.values())[::-1]
    keys = {setting.key for setting in settings}
    added = [setting for setting in _additions(complete, results) if setting.key not in keys]
    to_do = (f"{setting.key}: {setting.source}" for setting in added if setting.source == _TO_DO)
    imported = ImportedRecipe(
        (*_launcher_results(command), *results),
        (*settings, *added),
        (*command.notes, *_unset_variables(settings), *to_do),
    )
    parse_recipe(nested(imported.settings), label="the command")
    return imported


def with_defaults(command: Command) -> Command:
    """Return `command` with the defaults of sd-scripts for some missing flags."""
    values = dict(DEFAULTS)
    if command.has("max_train_epochs"):
        del values["max_train_steps"]
    if command.has("network_weights"):
        del values["network_dim"]
    elif command.script == "sdxl_train.py":
        values["network_dim"] = derived.FULL
    rates = derived.rates_of(command)
    if derived.traits(command).fixed_learning_rate is not None or all(
        rates[part] is not None for part in derived.parts_of(command)
    ):
        del values["learning_rate"]
    if command.has("flow_model"):
        values["flow_timestep_distribution"] = "logit_normal"
    if command.value("loss_type") in HUBER_LOSSES:
        values["huber_schedule"] = "snr"
    missing = {name: value for name, value in values.items() if not command.has(name)}
    defaults = tuple(Flag(name, (value,), is_default=True) for name, value in missing.items())
    return replace(command, flags=command.flags + defaults)


def _results(command: Command) -> Iterator[FlagResult]:
    for place, flag in enumerate(command.flags):
        if any(later.name == flag.name for later in command.flags[place + 1 :]):
            yield FlagResult(flag, "ignored", "a later value overrides it")
        else:
            yield from convert_flag(flag, command)


def _without_conflicts(results: Iterator[FlagResult]) -> tuple[FlagResult, ...]:
    """Return the results. If two flags set a key to different values, the first one is used."""
    owners: dict[str, tuple[Any, Flag]] = {}
    resolved: list[FlagResult] = []
    for result in results:
        clash = next((k for k, v in result.settings.items() if k in owners and owners[k][0] != v), None)
        if clash is not None:
            value, owner = owners[clash]
            why = f"{owner} already sets {clash} to {value}"
            resolved.append(FlagResult(result.flag, "unsupported", why))
            continue
        owners |= {key: (value, result.flag) for key, value in result.settings.items()}
        resolved.append(result)
    return tuple(resolved)


_LAUNCH = "a flag of accelerate; use it as in: accelerate launch ... -m spectune train"


def _launcher_results(command: Command) -> Iterator[FlagResult]:
    for flag in command.launcher:
        yield FlagResult(replace(flag, parent=LAUNCHER), "ignored", _LAUNCH)


_TO_DO = "to fill in"


def _additions(command: Command, results: Sequence[FlagResult]) -> Iterator[Setting]:
    """Yield settings that a recipe needs and sd-scripts implies."""
    yield Setting("objective.kind", "eps", "the default of sd-scripts")
    yield Setting("data.bucket.enabled", False, "the default of sd-scripts")
    if command.has("enable_bucket"):
        for key, value in (("min_px", 256), ("max_px", 1024), ("step_px", 64)):
            yield Setting(f"data.bucket.{key}", value, "the default of sd-scripts")
    parts = derived.parts_of(command)
    if parts != ALL_PARTS:
        yield Setting("model.parts", list(parts), f"{command.script} trains these parts with these flags")
    for key, value in derived.options_of(command).items():
        yield Setting(f"optimizer.options.{key}", value, "the default of sd-scripts")
    if not command.has("pretrained_model_name_or_path"):
        key = "model.residual" if command.has("network_weights") else "model.base"
        yield Setting(key, "model.safetensors", _TO_DO)
    if not any(result.settings.keys() & {"data.sets"} for result in results):
        yield Setting("data.folders", ["images"], _TO_DO)
    yield Setting("run.output", "output", _TO_DO)


def _source(result: FlagResult, *, first: bool) -> str:
    parent, name = result.flag.parent, result.flag.name
    flag = f"--{parent} {name}" if parent else f"--{name}"
    if result.flag.is_default:
        return f"the default of sd-scripts for {flag}"
    return f"{flag}; {result.why}" if result.why and first else flag


def _unset_variables(settings: Sequence[Setting]) -> Iterator[str]:
    for setting in settings:
        if isinstance(setting.value, str) and re.search(r"%\w+%|\$\{?\w+|!\w+!", setting.value):
            yield f"{setting.key} contains a variable that the text does not set: {setting.value}"


def rebased(value: Any, folder: Path) -> Any:
    """Return a path, or each path of a list, relative to `folder` instead of the working directory."""
    if isinstance(value, list):
        return [rebased(item, folder) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {key: rebased(item, folder) for key, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, PathText) and any(char < " " for char in value):
        raise InputError(f"the path {str(value)!r} contains a control character")
    if not isinstance(value, PathText) or folder.resolve() == Path.cwd().resolve():
        return value
    windows = PureWindowsPath(value)
    if windows.drive or windows.root or value.startswith("~"):
        return value
    here = Path.cwd().resolve() / PurePosixPath(windows.as_posix())
    try:
        return PathText(os.path.relpath(here, folder.resolve()).replace(os.sep, "/"))
    except ValueError:  # another drive of Windows: no relative path leads there
        return PathText(here.as_posix())


# ---------------------------------------------------------------- step 3 of the guide


def replaced_by_split(command: Command) -> str | None:
    """Return the `spectune split` command that replaces a command that trains nothing, else None.

    Step 3 of the guide trains an extract for one step with a learning rate of 1e-24. This changes no weight:
    the trainer only rewrites the file with its own keys, alpha and dtype. `split` writes them directly.
    """
    rates = [rate for rate in derived.rates_of(command).values() if rate is not None]
    model = command.value("pretrained_model_name_or_path")
    if model is None or not command.has("network_weights") or not rates or max(rates) > TRAINS_NOTHING:
        return None
    words = ["spectune", "split", _quoted(model)]
    rank = command.value("network_dim")
    conv_rank = derived.network_argument(command, "conv_dim")
    if rank is not None:
        words += ["--rank", rank]
    if conv_rank is not None and conv_rank != rank:
        words += ["--conv-rank", conv_rank]
    if dtype := trainer_dtype(command):
        words += ["--dtype", dtype]
    return " ".join([*words, "-o", _quoted(command.value("output_dir") or ".")])


def trainer_dtype(command: Command) -> str:
    """Return the dtype in which the trainer stores the factors, or "" if the command names none or fp16.

    The trainer rounds factors of another dtype. The residual does not contain that rounding.
    """
    precision = command.value("save_precision")
    if command.has("full_bf16") or precision == "bf16":
        return "bfloat16"
    return "float32" if precision == "float" and not command.has("full_fp16") else ""


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[\w./:\\-]+", text) and "\\" not in text else f'"{text}"'
