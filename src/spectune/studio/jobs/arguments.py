"""From the fields of a command's record to the arguments of the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from spectune.cli.command import CommandSpec, with_flags
from spectune.cli.commands import COMMANDS
from spectune.errors import InputError, did_you_mean, printable
from spectune.operation import OptionField, flags_of, option_fields
from spectune.studio.places import Places

# Pages ask the assistant instead of `new` and `recipe import`; a Studio starts no other Studio.
JOB_COMMANDS = {one.name: one for one in COMMANDS if one.name not in ("studio", "new", "recipe import")}
WRITTEN = ("out", "sheet", "plot")  # fields of files and folders that a command writes
_WORDS_WITH_PATHS = {"slices", "models", "adapters"}  # FILE:TRAIT:WEIGHT, or MODEL+ADAPTER:STRENGTH
_OVERRIDE = re.compile(r"[a-z0-9_.]+=[\w.,+-]*")  # of a recipe, without a path


def command_named(name: str) -> CommandSpec:
    """Return a command that can be a job. Raises InputError for all others."""
    if name not in JOB_COMMANDS:
        raise InputError(f"no job `{printable(name, 60)}`{did_you_mean(name, JOB_COMMANDS)}")
    return JOB_COMMANDS[name]


def arguments_of(command: CommandSpec, values: Mapping[str, Any], places: Places | None) -> list[str]:
    """Return the words of a command line that passes the values. No shell ever reads them.

    Args:
        command: The command.
        values: Fields of its record, as JSON types. None is a field that is not passed.
        places: The folders that may be used; None: any.

    Raises:
        InputError: A value is refused, as on the command line.
        Refused: A path is outside of the folders.
    """
    fields = option_fields(command.options)
    unknown = [name for name in values if name not in {field.name for field in fields}]
    if unknown:
        raise InputError(f"unknown option `{printable(unknown[0], 60)}`")
    passed = {name: value for name, value in values.items() if value is not None}
    for field in fields:
        if field.name in passed:
            _check(field, passed[field.name], places)
    try:
        command.options(**passed)
    except InputError as error:
        raise InputError(with_flags(command, error.what), hint=error.hint) from None
    options = [word for field in fields if not field.argument for word in _option(field, passed)]
    arguments = [field for field in fields if field.argument and field.name in passed]
    if any(field.old_flag for field in arguments):  # on the command line, the optional model comes first
        arguments.sort(key=lambda field: field.required)
    files = [word for field in arguments for word in _texts(passed[field.name])]
    # `--`: what follows is no option, whatever it begins with
    return [*command.name.split(), *options, *(["--", *files] if files else [])]


def _option(field: OptionField, passed: Mapping[str, Any]) -> list[str]:
    if field.name not in passed:
        return []
    flag, value = flags_of(field)[-1], passed[field.name]
    if field.kind is bool:
        return [flag] if value is (field.off is None) else []
    return [f"{flag}={text}" for text in _texts(value)]


def _texts(value: Any) -> list[str]:
    return [str(one) for one in cast("Sequence[Any]", value)] if isinstance(value, list) else [str(value)]


def _check(field: OptionField, value: Any, places: Places | None) -> None:
    """Raise InputError for a value that no option has, and Refused for a path outside of the folders."""
    values = cast("list[Any]", value) if field.many and isinstance(value, list) else [value]
    for one in values:
        if not isinstance(one, str | int | float):
            raise InputError(f"`{field.name}`: expected text or a number")
        text = str(one)
        if "\0" in text or any(0xD800 <= ord(char) < 0xE000 for char in text):
            raise InputError(f"`{field.name}` contains a character that no option can have")
        if places is None:
            continue
        if field.name == "overrides" and (".." in text or not _OVERRIDE.fullmatch(text)):
            raise InputError(f"`overrides` {printable(text, 60)}: write paths into the recipe")
        if field.kind is Path:
            places.inside(text)
        elif field.name in _WORDS_WITH_PATHS:
            for path in _paths_of(text):
                places.inside(path)


def _paths_of(word: str) -> list[str]:
    """Return the paths of a word such as `base.safetensors+style.safetensors:unet:0.8`."""
    paths: list[str] = []
    for piece in re.split(r"(?<=\.safetensors)\+|(?<=\d)\+(?=.*\.safetensors)", word):
        weighted = re.fullmatch(r"(.*?\.safetensors|.*?)(:[^/\\]*)?", piece, re.IGNORECASE | re.DOTALL)
        assert weighted is not None
        paths.append(weighted[1] if len(weighted[1]) > 1 else piece)  # `C:` is a drive
    return paths
