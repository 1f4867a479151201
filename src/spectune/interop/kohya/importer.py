"""From a command to the recipe that does the same, with an answer for every flag."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from spectune.errors import InputError
from spectune.interop.kohya import settings as setup
from spectune.interop.kohya.command_line import LAUNCHER, Command, Given
from spectune.interop.kohya.flags import DEFAULTS, judge
from spectune.interop.kohya.outcomes import Answer, PathText
from spectune.training.objective.losses import SCHEDULED_LOSSES
from spectune.training.recipe.file import parse_recipe
from spectune.training.recipe.sections import ALL_PARTS

# A step this small changes no number: the guide's step 3 has 1e-24.
TRAINS_NOTHING = 1e-12
RANK_OF_FULL_TRAINING = "64"  # for sdxl_train.py, which has none


@dataclass(frozen=True)
class Setting:
    """A key of the recipe, its value, and the flag it comes from or another reason."""

    key: str  # with its section: `data.bucket.min_px`
    value: Any
    source: str


@dataclass(frozen=True)
class ImportedRecipe:
    answers: tuple[Answer, ...]
    settings: tuple[Setting, ...]
    notes: tuple[str, ...]

    @property
    def understood(self) -> bool:
        """Whether nothing that the command asks for was left out for want of a way to do it."""
        return all(answer.verdict in ("taken", "ignored") for answer in self.answers)


def convert(command: Command, *, folder: Path) -> ImportedRecipe:
    """The recipe of a command, whose relative paths start here, for a file in `folder`.

    Raises InputError where the command names no model, or where its values do not make a recipe.
    """
    if command.value("pretrained_model_name_or_path") is None:
        raise InputError(
            "the command names no model", hint="--pretrained_model_name_or_path is the checkpoint to train"
        )
    complete = with_defaults(command)
    answers = _without_conflicts(_answers(complete))
    settings = [
        Setting(key, rebased(value, folder), _source(answer, first=place == 0))
        for answer in answers
        if answer.verdict == "taken"
        for place, (key, value) in enumerate(answer.settings.items())
    ]
    settings = list({setting.key: setting for setting in reversed(settings)}.values())[::-1]
    taken = {setting.key for setting in settings}
    added = [setting for setting in _additions(complete) if setting.key not in taken]
    conversion = ImportedRecipe(
        (*_launcher_answers(command), *answers),
        (*settings, *added),
        (*command.notes, *_doubts(settings), *(f"{s.key}: {s.source}" for s in added if s.source in _TO_DO)),
    )
    parse_recipe(nested(conversion.settings), label="the command")
    return conversion


def with_defaults(command: Command) -> Command:
    """`command` with the values that sd-scripts takes for some flags that are not given."""
    values = dict(DEFAULTS)
    if command.has("max_train_epochs"):
        del values["max_train_steps"]
    if command.has("network_weights"):
        del values["network_dim"]
    elif command.script == "sdxl_train.py":
        values["network_dim"] = RANK_OF_FULL_TRAINING
    rates = setup.rates_of(command)
    if setup.traits(command).fixed_learning_rate is not None or all(
        rates[part] is not None for part in setup.parts_of(command)
    ):
        del values["learning_rate"]
    if command.value("loss_type") in SCHEDULED_LOSSES:
        values["huber_schedule"] = "snr"
    missing = {name: value for name, value in values.items() if not command.has(name)}
    implied = tuple(Given(name, (value,), implied=True) for name, value in missing.items())
    return replace(command, flags=command.flags + implied)


def _answers(command: Command) -> Iterator[Answer]:
    for place, given in enumerate(command.flags):
        if any(later.name == given.name for later in command.flags[place + 1 :]):
            yield Answer(given, "ignored", "it is given again later")
        else:
            yield from judge(given, command)


def _without_conflicts(answers: Iterator[Answer]) -> tuple[Answer, ...]:
    """The answers, where a key that two flags set differently stays with the first."""
    held: dict[str, tuple[Any, Given]] = {}
    kept: list[Answer] = []
    for answer in answers:
        clash = next((k for k, v in answer.settings.items() if k in held and held[k][0] != v), None)
        if clash is not None:
            value, owner = held[clash]
            kept.append(Answer(answer.given, "unsupported", f"{clash} is {value} already, by {owner}"))
            continue
        held |= {key: (value, answer.given) for key, value in answer.settings.items()}
        kept.append(answer)
    return tuple(kept)


_LAUNCH = "it is for accelerate: accelerate launch ... -m spectune train works as well"


def _launcher_answers(command: Command) -> Iterator[Answer]:
    for given in command.launcher:
        told = Given(given.name, given.values, within=LAUNCHER)
        yield Answer(told, "ignored", _LAUNCH)


_TO_DO = ("to fill in",)


def _additions(command: Command) -> Iterator[Setting]:
    """What a recipe says and sd-scripts takes for granted."""
    yield Setting("objective.kind", "eps", "what sd-scripts trains unless it is told otherwise")
    parts = setup.parts_of(command)
    if parts != ALL_PARTS:
        yield Setting("model.parts", list(parts), f"what {command.script} trains with these flags")
    for key, value in setup.options_of(command).items():
        yield Setting(f"optimizer.options.{key}", value, "the default of sd-scripts")
    yield Setting("data.folders", ["images"], "to fill in")
    yield Setting("run.output", "output", "to fill in")


def _source(answer: Answer, *, first: bool) -> str:
    given = answer.given
    flag = f"--{given.within} {given.name}" if given.within else f"--{given.name}"
    if given.implied:
        return f"the default of sd-scripts for {flag}"
    return f"{flag}; {answer.why}" if answer.why and first else flag


def _doubts(settings: Sequence[Setting]) -> Iterator[str]:
    for setting in settings:
        if isinstance(setting.value, str) and re.search(r"%\w+%|\$\{?\w+|!\w+!", setting.value):
            yield f"{setting.key} holds a variable that the text does not set: {setting.value}"


def nested(settings: Sequence[Setting]) -> dict[str, Any]:
    """The settings as the mapping that a recipe is parsed from."""
    data: dict[str, Any] = {}
    for setting in settings:
        *sections, key = setting.key.split(".")
        place = data
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = setting.value
    return data


def rebased(value: Any, folder: Path) -> Any:
    """A path, or the paths in a list, as seen from `folder` instead of the working directory."""
    if isinstance(value, list):
        return [rebased(item, folder) for item in value]
    if not isinstance(value, PathText) or folder.resolve() == Path.cwd().resolve():
        return value
    windows = PureWindowsPath(value)
    if windows.drive or windows.root or value.startswith("~"):
        return value
    here = Path.cwd().resolve() / PurePosixPath(windows.as_posix())
    return PathText(os.path.relpath(here, folder.resolve()).replace(os.sep, "/"))


# ---------------------------------------------------------------- the guide's step 3


def replaced_by_split(command: Command) -> str | None:
    """The `spectune split` that replaces a command which only rewrites an extract; None for one that trains.

    The guide's step 3 trains an extract for one step at a rate of 1e-24: nothing changes, except that
    the trainer writes its own keys, alpha and type. `split` writes those at once.
    """
    rates = [rate for rate in setup.rates_of(command).values() if rate is not None]
    model = command.value("pretrained_model_name_or_path")
    if model is None or not command.has("network_weights") or not rates or max(rates) > TRAINS_NOTHING:
        return None
    words = ["spectune", "split", _quoted(model)]
    rank = command.value("network_dim")
    conv_rank = setup.network_argument(command, "conv_dim")
    if rank is not None:
        words += ["--rank", rank]
    if conv_rank is not None and conv_rank != rank:
        words += ["--conv-rank", conv_rank]
    return " ".join([*words, "-o", _quoted(command.value("output_dir") or ".")])


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[\w./:\\-]+", text) and "\\" not in text else f'"{text}"'


def kept_out(answers: Sequence[Answer]) -> Mapping[str, list[Answer]]:
    """The answers that left nothing in the recipe, by heading."""
    headings = {"ignored": "ignored", "unsupported": "not supported", "unknown": "not supported"}
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        if answer.verdict in headings:
            groups.setdefault(headings[answer.verdict], []).append(answer)
    return groups
