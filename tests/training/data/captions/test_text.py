from __future__ import annotations

from pathlib import Path

import pytest

from spectune.files.text import UnreadableText, decode, read_text
from spectune.training.data.captions.text import LARGEST_CAPTION, has_more_lines, used_lines

TEXT = "a café, 猫 \u2028 on a mat\n"


@pytest.mark.parametrize(
    ("data", "text", "encoding"),
    [
        (TEXT.encode(), TEXT, "UTF-8"),
        (TEXT.encode("utf-8-sig"), TEXT, "UTF-8 with a byte order mark"),
        (TEXT.encode("utf-16"), TEXT, "UTF-16"),
        (b"\xfe\xff" + TEXT.encode("utf-16-be"), TEXT, "UTF-16"),
        (TEXT.encode("utf-32"), TEXT, "UTF-32"),
        ("a red cat".encode("utf-16-le"), "a red cat", "UTF-16"),
        ("a café".encode("utf-16-be"), "a café", "UTF-16"),
        ("café, “naïve”, 5 €".encode("cp1252"), "café, “naïve”, 5 €", "cp1252"),
        ("señor".encode("latin-1"), "señor", "cp1252"),
        (b"", "", "UTF-8"),
    ],
)
def test_encodings(data: bytes, text: str, encoding: str) -> None:
    decoded = decode(data)
    assert (decoded.text, decoded.encoding) == (text, encoding)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("赤い猫が座っている".encode("shift-jis"), "is not valid UTF-8"),
        ("рыжий кот".encode("cp1251"), None),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is not valid UTF-8"),
        (b"a\0b c\0\0d", "contains zero bytes"),
        (b"\xff\xfea", "is not valid UTF-16"),
    ],
)
def test_other_bytes_are_refused(data: bytes, reason: str | None) -> None:
    if reason is None:  # short words look like Western letters
        assert decode(data).encoding == "cp1252"
        return
    with pytest.raises(UnreadableText, match=reason):
        decode(data)


def test_only_real_line_ends_end_a_line() -> None:
    assert used_lines("a cat \u2028on\x0ca\x85mat\x1d!\v", "first") == ["a cat \u2028on\x0ca\x85mat\x1d!"]
    assert used_lines("one\rtwo\r\nthree\nfour", "random") == ["one", "two", "three", "four"]


@pytest.mark.parametrize(
    ("text", "first", "joined", "more"),
    [
        ("tag1,\ntag2,\ntag3, tag4", "tag1,", "tag1, tag2, tag3, tag4", True),
        ("\n\na real caption\n", "a real caption", "a real caption", True),
        ("A cat.\nIt sits", "A cat.", "A cat. It sits", True),
        ("red\nround", "red", "red, round", True),
        ("one\n \n", "one", "one", False),
        ("", "", "", False),
    ],
)
def test_lines(text: str, first: str, joined: str, more: bool) -> None:
    assert used_lines(text, "first") == [first]
    assert used_lines(text, "all") == [joined]
    assert has_more_lines(text) is more


def test_a_file_that_is_no_caption(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(UnreadableText, match="cannot be opened"):
        read_text(path)
    path.write_bytes(b"a" * (LARGEST_CAPTION + 1))
    with pytest.raises(UnreadableText, match="is larger than 128 KiB"):
        read_text(path, largest=LARGEST_CAPTION)
    assert len(read_text(path).text) == LARGEST_CAPTION + 1
