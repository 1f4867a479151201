"""Split captions into lines."""

from __future__ import annotations

import re

from spectune.training.recipe.sections.captions import Lines

_LINE_END = re.compile(r"\r\n|\r|\n")
_ENDS_SENTENCE_OR_TAG = (",", ".", ";", ":", "!", "?")
LARGEST_CAPTION = 128 * 1024  # bytes of a caption file; a larger one takes seconds to check for mistakes


def text_lines(text: str) -> list[str]:
    r"""Return the stripped lines of a text. Only `\n`, `\r\n` and `\r` end a line."""
    return [line.strip() for line in _LINE_END.split(text)]


def used_lines(text: str, lines: Lines) -> list[str]:
    """Return the lines of a caption that are used, of which one is drawn; [""] for a caption without text."""
    full = [line for line in text_lines(text) if line] or [""]
    if lines == "random":
        return full
    return full[:1] if lines == "first" else [_joined(full)]


def has_more_lines(text: str) -> bool:
    """Return whether there is text beyond the first line."""
    return any(text_lines(text)[1:])


def _joined(lines: list[str]) -> str:
    """Join lines with a space after punctuation, and with a comma otherwise."""
    ended = [line if line.endswith(_ENDS_SENTENCE_OR_TAG) else f"{line}," for line in lines[:-1]]
    return " ".join([*ended, lines[-1]])
