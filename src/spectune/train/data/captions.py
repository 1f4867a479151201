"""What is said of a picture: reading caption files, shuffling tags, dropping captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from spectune.errors import InputError


@dataclass(frozen=True)
class CaptionRules:
    """How captions vary from draw to draw; a shuffle keeps the first `keep_tokens` tags in place."""

    shuffle: bool = False
    keep_tokens: int = 0
    dropout_probability: float = 0.0


def read_caption(image: Path, extensions: Sequence[str]) -> str | None:
    """The first line of the caption file beside `image`, or None when there is none.

    Raises InputError when the file is not UTF-8.
    """
    for extension in extensions:
        path = image.with_suffix(extension)
        if path.is_file():
            try:
                lines = path.read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise InputError(f"{path} is not UTF-8 text", hint="save the captions as UTF-8") from error
            return lines[0].strip() if lines else ""
    return None


def draw_caption(caption: str, rules: CaptionRules, random: Random) -> str:
    """The caption as one draw sees it: "" when dropped, else with its tags shuffled."""
    if random.random() < rules.dropout_probability:
        return ""
    if not rules.shuffle:
        return caption
    tags = [tag.strip() for tag in caption.split(",")]
    kept, loose = tags[: rules.keep_tokens], tags[rules.keep_tokens :]
    random.shuffle(loose)
    return ", ".join([*kept, *loose])
