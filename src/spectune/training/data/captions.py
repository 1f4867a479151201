"""Read captions from files; shuffle and drop tags; drop complete captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from spectune.errors import InputError
from spectune.training.recipe.sections.data import CaptionSection

_LINE_HINT = 'a line looks like {"file_name": "cat.png", "text": "a cat"}'


def read_caption(image: Path, extensions: Sequence[str]) -> str | None:
    """Return the first line of the caption file of `image`, or None if it has no such file.

    Raises:
        InputError: The file is not UTF-8.
    """
    for extension in extensions:
        path = image.with_suffix(extension)
        if path.is_file():
            lines = _text(path).splitlines()
            return lines[0].strip() if lines else ""
    return None


def read_sidecar(path: Path) -> dict[str, str]:
    """Return the captions in a JSONL file by file name; each line is an object with `file_name` and `text`.

    Raises:
        InputError: A line is not such an object or repeats a file name. The message gives the line number.
    """
    captions: dict[str, str] = {}
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        name, text = _entry(line, f"{path} line {number}")
        if name in captions:
            raise InputError(f"{path} line {number} repeats {name}", hint="keep one entry per file")
        captions[name] = text.strip()
    return captions


def _entry(line: str, where: str) -> tuple[str, str]:
    try:
        entry: Any = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}", hint=_LINE_HINT) from error
    if not isinstance(entry, dict):
        raise InputError(f"{where} is not an object", hint=_LINE_HINT)
    name, text = entry.get("file_name"), entry.get("text")
    if not isinstance(name, str) or not isinstance(text, str):
        key = "text" if isinstance(name, str) else "file_name"
        raise InputError(f"{where} has no string `{key}`", hint=_LINE_HINT)
    return name, text


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text", hint="save the captions as UTF-8") from error


def draw_caption(caption: str, rules: CaptionSection, random: Random) -> str:
    """Return the caption of one draw: with tags dropped and shuffled, or "" if it is dropped."""
    if random.random() < rules.dropout_probability:
        return ""
    if not rules.shuffle and not rules.tag_dropout_probability:
        return caption
    tags = [tag.strip() for tag in caption.split(",")]
    kept, loose = tags[: rules.keep_tokens], tags[rules.keep_tokens :]
    if rules.tag_dropout_probability:
        loose = [tag for tag in loose if random.random() >= rules.tag_dropout_probability]
    if rules.shuffle:
        random.shuffle(loose)
    return ", ".join([*kept, *loose])
