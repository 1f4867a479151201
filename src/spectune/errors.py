"""Everything a user can be told: what is wrong, where, what was expected, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class SpectuneError(Exception):
    """A failure that the user can act on: `what` happened, and a `hint` at the next step."""

    exit_code = 2

    def __init__(self, what: str, *, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


class InputError(SpectuneError):
    """A file or an argument is wrong."""


class PairingError(SpectuneError):
    """Files that do not belong together; the message names both hashes."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean `rank`?"`` if a known word is close to `word`, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def some_of(names: Sequence[str], shown: int = 3) -> str:
    """The first few of `names` and how many more there are: ``a, b, c (2 more)``."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" ({rest} more)" if rest > 0 else "")


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return a count with its noun: ``1 folder``, ``1,052 layers``; `plural` for irregular nouns."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
