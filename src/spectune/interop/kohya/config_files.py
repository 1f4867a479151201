"""Read scripts and settings files, and the configuration file that a command names."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from spectune.errors import InputError, printable
from spectune.interop.kohya.command_line import LONGEST_TEXT, SCRIPTS, Command, Flag, parse_command
from spectune.interop.kohya.dataset_config import PARENT, is_dataset_config, with_images
from spectune.interop.kohya.gui import parse_gui_json


def parse_toml(text: str, label: str) -> Command:
    """Return the command with the settings of a configuration file. sd-scripts ignores its sections."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{label} is not valid TOML: {printable(str(error))}") from error
    if is_dataset_config(data):
        note = f"{label} is a --dataset_config: its subsets become [[data.sets]]; it names no model to train"
        command = Command(SCRIPTS[0], (Flag(PARENT, (label,)),), notes=(note,), is_complete=False)
        return with_images(command, data, label)
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= cast("dict[str, Any]", value) if isinstance(value, dict) else {key: value}
    flags = [Flag(key, _values(value)) for key, value in flat.items() if _is_on(value)]
    if not flags:
        raise InputError(f"{label} contains no settings", hint="pass a configuration file of sd-scripts")
    return Command(SCRIPTS[0], tuple(flags))


def _is_on(value: Any) -> bool:
    return value is not None and value is not False and value != "" and value != []


def _values(value: Any) -> tuple[str, ...]:
    if value is True:
        return ()
    return tuple(str(item) for item in value) if isinstance(value, list) else (str(value),)


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, UTF-16 with a byte order mark (PowerShell), or Windows-1252.

    Raises:
        InputError: The file is too large, or is not valid UTF-16.
    """
    if path.stat().st_size > 4 * LONGEST_TEXT:
        raise InputError(
            f"{path.name} has {path.stat().st_size:,} bytes: expected a command or settings",
            hint="pass a .bat, .sh, .ps1, .txt, .toml or .json file",
        )
    raw = path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        try:
            return raw.decode("utf-16")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path.name} is not valid UTF-16: {error.reason}", hint="save it as UTF-8"
            ) from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("cp1252", errors="replace")


def parse_file(path: Path) -> Command:
    """Read the command in a file: settings for .toml and .json, otherwise the text of a script."""
    text = read_text(path)
    match path.suffix.lower():
        case ".toml":
            return parse_toml(text, path.name)
        case ".json":
            return parse_gui_json(text, path.name)
        case _:
            return parse_command(text)


def with_config_file(command: Command, folder: Path) -> Command:
    """Return `command` with the flags of its --config_file added.

    Flags of the command override those of the file, as in sd-scripts. The path is relative to `folder`.

    Raises:
        InputError: The file is missing or is not valid.
    """
    name = command.value("config_file")
    if name is None:
        return command
    path = folder / (name if name.endswith(".toml") else f"{name}.toml")
    if not path.is_file():
        raise InputError(
            f"--config_file {path} does not exist",
            hint="import the file itself, or run in the folder that contains it",
        )
    config = parse_toml(read_text(path), path.name)
    added = tuple(flag for flag in config.flags if not command.has(flag.name))
    return replace(command, flags=command.flags + added)
