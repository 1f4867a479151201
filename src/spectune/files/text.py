"""Read text files in the encodings that people have."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from pathlib import Path

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
