"""Read text files in the encodings that people have, and JSON and TOML that may come from a stranger."""

from __future__ import annotations

import codecs
import json
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

UTF8 = "UTF-8"
# UTF-32 first: its little-endian mark begins with that of UTF-16
_MARKS: tuple[tuple[bytes, str, str], ...] = (
    (codecs.BOM_UTF32_LE, "UTF-32", "utf-32"),
    (codecs.BOM_UTF32_BE, "UTF-32", "utf-32"),
    (codecs.BOM_UTF8, "UTF-8 with a byte order mark", "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "UTF-16", "utf-16"),
    (codecs.BOM_UTF16_BE, "UTF-16", "utf-16"),
)
# Western text has short runs of letters beyond ASCII. Long runs are another encoding, such as Shift-JIS.
_NOT_WESTERN = re.compile(rb"[\x80-\xff]{6}|[\x00-\x08\x0e-\x1f\x7f\x81\x8d\x8f\x90\x9d]")

_DEEPEST = 100  # levels of JSON and TOML; the formats that are read have at most ten
_MOST_DIGITS = 100  # of a whole number
_MOST_DOTS = 300  # in the keys of a line of TOML: the time for a key with n dots grows with the square of n
_TOO_DEEP = "it is nested too deeply"
_TOO_LONG = "a number has too many digits"


class UnreadableText(Exception):
    """A file that is not text; the message gives the reason, after the name of the file."""


@dataclass(frozen=True)
class Decoded:
    """The text of a file and the name of its encoding."""

    text: str
    encoding: str


def read_text(path: Path, *, largest: int | None = None) -> Decoded:
    """Read a text file of at most `largest` bytes in UTF-8, UTF-16, UTF-32 or cp1252.

    Raises:
        UnreadableText: The file cannot be read, or is none of these.
    """
    try:
        with path.open("rb") as file:
            data = file.read() if largest is None else file.read(largest + 1)
    except OSError as error:
        raise UnreadableText(f"cannot be opened: {error.strerror}") from error
    if largest is not None and len(data) > largest:
        raise UnreadableText(f"is larger than {largest // 1024} KiB, too large")
    return decode(data)


def decode(data: bytes) -> Decoded:
    """Return the text in `data`.

    A byte order mark decides. Without one, zero bytes at only the even or only the odd places mean UTF-16,
    and bytes that are not UTF-8 mean cp1252, which contains the letters of latin-1.

    Raises:
        UnreadableText: The bytes are not text in one of these encodings.
    """
    marked = [(name, codec) for mark, name, codec in _MARKS if data.startswith(mark)]
    name, codec = marked[0] if marked else _unmarked(data)
    try:
        text = data.decode(codec)
    except UnicodeDecodeError as error:
        raise UnreadableText(f"is not valid {name}") from error
    if "\0" in text:
        raise UnreadableText("contains zero bytes: it is not text")
    return Decoded(text, name)


def _unmarked(data: bytes) -> tuple[str, str]:
    """Return the name and the codec of bytes without a byte order mark."""
    if zeros := data.count(0):
        for start, codec in ((1, "utf-16-le"), (0, "utf-16-be")):
            if data[start::2].count(0) == zeros and 4 * zeros >= len(data):
                return "UTF-16", codec
        return UTF8, "utf-8"
    try:
        data.decode()
    except UnicodeDecodeError:
        if not _NOT_WESTERN.search(data):
            return "cp1252", "cp1252"
    return UTF8, "utf-8"


def load_json(text: str | bytes, *, unique: bool = False) -> Any:
    """Parse JSON; with `unique`, no object may have a name twice.

    Raises:
        ValueError: The text is not JSON in UTF-8, is nested too deeply, or contains a number with very many
            digits or half of a surrogate pair, which no file can store.
    """
    decoded = text if isinstance(text, str) else text.decode("utf-8")
    return _checked(lambda: json.loads(decoded, object_pairs_hook=_unique if unique else None))


def load_toml(text: str) -> dict[str, Any]:
    """Parse TOML.

    Raises:
        ValueError: The text is not TOML, is nested too deeply, or contains a number with very many digits.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.count(".") > _MOST_DOTS and _dots_in_keys(line) > _MOST_DOTS:
            raise ValueError(f"line {number} has more than {_MOST_DOTS} dots outside of texts: divide it")
    return _checked(lambda: tomllib.loads(text))


def _dots_in_keys(line: str) -> int:
    """Return the number of dots in a line of TOML that are not in a text or a comment."""
    dots, quote = 0, ""
    characters = iter(line)
    for character in characters:
        if quote:
            if quote == '"' and character == "\\":
                next(characters, "")
            elif character == quote:
                quote = ""
        elif character in "\"'":
            quote = character
        elif character == "#":
            break
        else:
            dots += character == "."
    return dots


def _checked(parse: Callable[[], Any]) -> Any:
    try:
        value = parse()
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except ValueError as error:
        raise ValueError(_plain(error)) from None
    _check_values(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("it contains a name twice")
    return record


def _plain(error: ValueError) -> str:
    """Return the message of the library, without its advice to change a setting of Python."""
    return _TOO_LONG if "integer string conversion" in str(error) else str(error)


def _check_values(value: object) -> None:
    """Raise ValueError for values that later code cannot print or store."""
    level: list[object] = [value]
    for _ in range(_DEEPEST):
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                table = cast("dict[str, object]", item)
                below += [*table, *table.values()]
            elif isinstance(item, list):
                below += cast("Iterable[object]", item)
            elif isinstance(item, str) and not (item.isascii() or is_storable(item)):
                raise ValueError("a text contains half of a surrogate pair")
            elif isinstance(item, int) and abs(item) >= 10**_MOST_DIGITS:
                raise ValueError(_TOO_LONG)
        level = below
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def storable(text: str) -> str:
    """Return a text that UTF-8 can store: halves of surrogate pairs, as in odd file names, become `?`."""
    return text.encode("utf-8", "replace").decode()


def is_storable(text: str) -> bool:
    """Return whether a text can be stored in UTF-8: it contains no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
