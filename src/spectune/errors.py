"""The errors for users: what is wrong, where, what was expected, and a hint on what to do."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path


class SpectuneError(Exception):
    """A failure that the user can act on: `what` happened, and a `hint` on what to do."""

    exit_code = 2

    def __init__(self, what: str, *, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


class InputError(SpectuneError):
    """A file or an argument is wrong."""


class PairingError(SpectuneError):
    """Files do not belong together; the message has both hashes."""


class FileNote(UserWarning):
    """A file was read in a way that the user should know. The command line prints it as `note:`."""


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
    line = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text.strip())
    return line if len(line) <= longest else line[: longest - 3] + "..."


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
