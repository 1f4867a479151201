"""Read scripts and settings files, and the configuration files that a command names.

The subsets of a --dataset_config become [[data.sets]] (source: library/config_util.py of sd-scripts). A
subset inherits from its dataset, from [general], and from the command. spectune has most of these settings
once for all images, so a setting that differs between subsets is reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from spectune.errors import InputError, printable
from spectune.files.text import load_json, load_toml
from spectune.interop.kohya.command_line import (
    LONGEST_TEXT,
    MOST_WORDS,
    SCRIPTS,
    Command,
    Dataset,
    Flag,
    parse_command,
)
from spectune.interop.kohya.gui import parse_gui_json
from spectune.interop.kohya.rules import PathText

PARENT = "dataset_config"
MOST_SUBSETS = 1000  # each becomes a table of the recipe
Table = Mapping[str, Any]

# Settings of one subset. All others apply to all images.
_OF_A_SET = ("image_dir", "num_repeats", "class_tokens", "is_reg", "metadata_file", "conditioning_data_dir")
_FLAG_NAMES = {"batch_size": "train_batch_size"}
_REPLACED = ("train_data_dir", "reg_data_dir", "in_json", "dataset_repeats")  # sd-scripts ignores them


def parse_toml(text: str, label: str) -> Command:
    """Return the command with the settings of a configuration file. sd-scripts ignores its sections."""
    try:
        data = load_toml(text)
    except ValueError as error:
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


# ---------------------------------------------------------------- --dataset_config


def is_dataset_config(data: Table) -> bool:
    datasets = data.get("datasets")
    return isinstance(datasets, list) and all(isinstance(item, dict) for item in cast("list[Any]", datasets))


def with_dataset_config(command: Command, folder: Path) -> Command:
    """Return `command` with the images of its --dataset_config. A missing file is left to the flag's rule.

    A relative path starts in `folder`.
    """
    name = command.value(PARENT)
    if name is None or command.dataset is not None or not (folder / name).is_file():
        return command
    path = folder / name
    return with_images(command, parse_dataset_config(read_text(path), path.name), path.name)


def parse_dataset_config(text: str, label: str) -> Table:
    """Return the content of a .toml or .json file.

    Raises:
        InputError: It is neither, or has no list of datasets.
    """
    try:
        data: Any = load_json(text) if text.lstrip().startswith("{") else load_toml(text)
    except ValueError as error:
        raise InputError(f"{label} is not a valid dataset config: {printable(str(error))}") from error
    if not isinstance(data, dict) or not is_dataset_config(cast("Table", data)):
        raise InputError(f"{label} is no dataset config: expected [[datasets]] with [[datasets.subsets]]")
    return cast("Table", data)


def with_images(command: Command, config: Table, label: str) -> Command:
    """Return `command` with the sets of `config`, and with its other settings as flags.

    Raises:
        InputError: No subset names a folder of images, or there are too many.
    """
    subsets = list(_subsets(config))
    problems: list[tuple[Flag, str]] = []
    sets = [one for subset in subsets if (one := _image_set(subset, problems)) is not None]
    if not sets:
        raise InputError(
            f"{label} has no subset with `image_dir`", hint="each subset names a folder of images"
        )
    shared = sorted({key for subset in subsets for key in subset} - set(_OF_A_SET))
    if len(subsets) > MOST_SUBSETS or len(shared) > MOST_WORDS:
        raise InputError(
            f"{label} has {len(subsets):,} subsets with {len(shared):,} settings: "
            f"expected at most {MOST_SUBSETS:,} and {MOST_WORDS}",
            hint="put the images into fewer folders",
        )
    added: list[Flag] = []
    overridden: set[str] = set()
    for key in shared:
        name = _FLAG_NAMES.get(key, key)
        values = [_text(subset[key]) if key in subset else _of_command(command, name) for subset in subsets]
        distinct = list(dict.fromkeys(values))
        if len(distinct) > 1:
            words = tuple(" ".join(value) or "on" if value is not None else "default" for value in distinct)
            why = f"all images have one value: subsets differ; the recipe uses {words[0]}"
            problems.append((Flag(key, words, parent=PARENT), why))
        overridden.add(name)
        added += [] if values[0] is None else [Flag(name, values[0], parent=PARENT)]
    dropped = sorted({flag.name for flag in command.flags if flag.name in (*_REPLACED, *overridden)})
    notes = [f"dropped: --{name}: the dataset config replaces it" for name in dropped]
    kept = tuple(flag for flag in command.flags if flag.name not in dropped)
    return replace(
        command,
        flags=(*kept, *added),
        notes=(*command.notes, *notes),
        dataset=Dataset(tuple(sets), tuple(problems)),
    )


def _subsets(config: Table) -> Iterator[dict[str, Any]]:
    """Yield each subset with the settings that it inherits from its dataset and from [general]."""
    general = config.get("general", {})
    for dataset in config["datasets"]:
        own = {key: value for key, value in dataset.items() if key != "subsets"}
        for subset in dataset.get("subsets", []):
            yield {**general, **own, **subset}


def _image_set(subset: Table, problems: list[tuple[Flag, str]]) -> dict[str, Any] | None:
    """Return the table of one subset, or None for a subset that sd-scripts skips."""
    folder = str(subset.get("image_dir", ""))
    for key, why in (
        ("metadata_file", "write captions as .txt files or as metadata.jsonl in the folder of the images"),
        ("conditioning_data_dir", "put the masks into the image folder: cat.mask.png for cat.webp"),
    ):
        if key in subset:
            problems.append((Flag(key, (str(subset[key]),), parent=PARENT), why))
    repeats = subset.get("num_repeats", 1)
    if not folder or not isinstance(repeats, int) or repeats < 1:
        why = "this subset is left out: it needs a folder, and at least one repeat"
        problems.append((Flag("image_dir", (folder or "(none)",), parent=PARENT), why))
        return None
    images: dict[str, Any] = {"path": PathText(folder), "repeats": repeats}
    if tokens := subset.get("class_tokens"):
        images["caption"] = str(tokens)
    if subset.get("is_reg"):
        images["regularisation"] = True
    return images


def _text(value: Any) -> tuple[str, ...] | None:
    """Return the values of a flag, () for a switch that is on, or None for one that is off."""
    if value is True:
        return ()
    if value is None or value is False or value == "":
        return None
    return (",".join(map(str, cast("list[Any]", value))) if isinstance(value, list) else str(value),)


def _of_command(command: Command, name: str) -> tuple[str, ...] | None:
    return command.values(name) if command.has(name) else None
