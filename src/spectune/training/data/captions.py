"""What is said of a picture: reading captions, shuffling and dropping tags, dropping captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from spectune.errors import InputError

_ENTRY = '{"file_name": "cat.png", "text": "a cat"}'


@dataclass(frozen=True)
class CaptionRules:
    """How captions vary from draw to draw; the first `keep_tokens` tags stay, and stay in place."""

    shuffle: bool = False
    keep_tokens: int = 0
    dropout_probability: float = 0.0  # caption -> ""
    tag_dropout_probability: float = 0.0  # of each tag by itself


def read_caption(image: Path, extensions: Sequence[str]) -> str | None:
    """The first line of the caption file beside `image`, or None when there is none.

    Raises InputError when the file is not UTF-8.
    """
    for extension in extensions:
        path = image.with_suffix(extension)
        if path.is_file():
            lines = _text(path).splitlines()
            return lines[0].strip() if lines else ""
    return None


def read_sidecar(path: Path) -> dict[str, str]:
    """The captions by file name in a JSONL file, one object with `file_name` and `text` a line.

    Raises InputError with the number of the line that is not one, or that names a file again.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        name, text = _entry(line, f"{path} line {number}")
        if name in found:
            raise InputError(
                f"{path} line {number} names {name} a second time", hint="keep one of its entries"
            )
        found[name] = text.strip()
    return found


def _entry(line: str, where: str) -> tuple[str, str]:
    try:
        entry: Any = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}", hint=f"a line looks like {_ENTRY}") from error
    if not isinstance(entry, dict):
        raise InputError(f"{where} is not an object", hint=f"a line looks like {_ENTRY}")
    name, text = entry.get("file_name"), entry.get("text")
    if not isinstance(name, str) or not isinstance(text, str):
        key = "text" if isinstance(name, str) else "file_name"
        raise InputError(f"{where} has no string `{key}`", hint=f"a line looks like {_ENTRY}")
    return name, text


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text", hint="save the captions as UTF-8") from error


def draw_caption(caption: str, rules: CaptionRules, random: Random) -> str:
    """The caption as one draw sees it: "" when dropped, else with its tags dropped and shuffled."""
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
