"""The errors for users: what is wrong, where, what was expected, and a hint on what to do."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import signal
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class SpectuneError(Exception):
    """A failure that the user can act on: `what` happened, and a `hint` on what to do."""

    exit_code = 2
    is_reported = False  # another process of the same training prints it

    def __init__(self, what: str, *, hint: str | None = None) -> None:
        self.what = one_line(what)
        self.hint = None if hint is None else one_line(hint)
        super().__init__(self.what)


class InputError(SpectuneError):
    """A file or an argument is wrong."""


class PairingError(SpectuneError):
    """Files do not belong together; the message has both hashes."""


class Stopped(SystemExit):
    """Raised when a signal such as SIGTERM ends a command; `code` is the exit code, 128 plus its number.

    If one process of a training gets a signal, all of them raise it.
    """

    is_reported = False  # another process of the same training prints it

    def __init__(self, code: int) -> None:
        self.what = f"stopped by {signal.Signals(code - 128).name}"
        super().__init__(code)


class FileNote(UserWarning):
    """A file was read in a way that the user should know. The command line prints it as `note:`."""

    def __init__(self, what: str) -> None:
        super().__init__(one_line(what))


def check_all(items: Iterable[T], function: Callable[[T], R]) -> list[R]:
    """Return `function(item)` of all items; raise one InputError for all items that it refuses.

    The error has the first three messages with their hints, and the number of the others.
    """
    results: list[R] = []
    by_message: dict[str, InputError] = {}
    for item in items:
        try:
            results.append(function(item))
        except InputError as error:
            by_message.setdefault(error.what, error)
    count, errors = len(by_message), [*by_message.values()][:3]
    if not errors:
        return results
    if count == 1:
        raise errors[0]
    rest = f" ({count - len(errors)} more)" if count > len(errors) else ""
    hints = dict.fromkeys(error.hint for error in errors if error.hint)
    what = "; ".join(error.what for error in errors) + rest
    raise InputError(what, hint="; ".join(hints) or None) from errors[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean `rank`?"`` if a known word is close to `word`, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def some_of(names: Sequence[str], shown: int = 3) -> str:
    """Return the first few names and the number of the rest: ``a, b, c (2 more)``."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" ({rest} more)" if rest > 0 else "")


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return a count with its noun: ``1 folder``, ``1,052 layers``; `plural` for irregular nouns."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def printable(text: str, longest: int = 200) -> str:
    """Return foreign text for one line of output: control characters are replaced, a long text is cut."""
    line = visible(text.strip()).replace("\n", "\N{REPLACEMENT CHARACTER}")
    return line if len(line) <= longest else line[: longest - 3] + "..."


_LONGEST_WORD, _LONGEST_MESSAGE = 400, 8000  # characters


def visible(text: str) -> str:
    """Replace characters that move the cursor, control a terminal or reorder text; line breaks stay."""
    if text.isascii() and text.isprintable():
        return text
    invisible = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format (bidirectional marks), surrogate, separators
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if char != "\n" and unicodedata.category(char) in invisible else char
        for char in text
    )


def one_line(text: str) -> str:
    """Return a message as one visible line. Long words and messages are cut and get their length.

    Names and values in a message may come from a stranger's file.
    """
    line = " ".join(visible(text).split("\n"))
    line = re.sub(rf"\S{{{_LONGEST_WORD + 1},}}", lambda word: _cut(word[0], _LONGEST_WORD // 2), line)
    return line if len(line) <= _LONGEST_MESSAGE else _cut(line, _LONGEST_MESSAGE // 2)


def _cut(text: str, kept: int) -> str:
    return f"{text[:kept]}... ({len(text):,} characters)"


def quoted(path: Path, *, windows: bool = os.name == "nt") -> str:
    """Return a path as one argument of cmd, PowerShell and bash.

    Double quotes do in all three, except around `$`, a backtick or `!`. cmd has no other quotes, so these
    characters get single quotes only on systems without it.
    """
    text = path.as_posix()  # Windows accepts / and bash needs it
    if re.fullmatch(r"[\w./:][\w./:-]*", text, flags=re.ASCII):
        return text
    if windows or not re.search(r'[$`!"\\]', text):
        return f'"{text}"'
    return shlex.quote(text)
