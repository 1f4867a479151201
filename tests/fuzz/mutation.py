"""Hypothesis strategies that damage valid bytes, texts and JSON values."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, TypeVar, cast

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

T = TypeVar("T")

NUMBERS: tuple[Any, ...] = (
    0,
    -1,
    1,
    2,
    3,
    255,
    2**31,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    -(2**63),
    0.5,
    -0.0,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
    -float("inf"),
)
TEXTS = (
    "",
    " ",
    ".",
    "..",
    "../..",
    "/",
    "\\",
    "C:\\",
    "//host/share",
    "CON",
    "nul",
    "a/b.safetensors",
    "-",
    "--help",
    "~",
    "%PATH%",
    "$HOME",
    "{x}",
    "%s%n",
    "[red]",
    "a:b",
    ":",
    "=",
    ",",
    "nan",
    "inf",
    "1e999",
    "0x10",
    "1_000",
    "١٢",
    "true",
    "None",
    "\0",
    "a\0b",
    "\n",
    "a\nhint: b",
    "\r",
    "\t",
    "\x1b[2J",
    "\x1b]0;title\x07",
    "\u202eabc",
    "\u200b",
    "\ud800",
    "e\u0301",
    "ﬁ",
    "İ",
    "ß",
    "😀",
    "é" * 300,
    "x" * 5000,
    "9" * 5000,
    "0." + "1" * 5000,
    "[" * 3000,
    "{" * 3000,
    "(" * 3000,
    "a." * 2000,
    '"',
    "'",
    '"""',
    "`",
    "#",
    ";",
    "^",
    "|",
    "&",
)
PIECES = (
    b"\0",
    b"\xff",
    b"\xff" * 8,
    b"\0" * 64,
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xfe\xff",
    b"\xed\xa0\x80",
    b"\x80",
    b"\n",
    b"\r\n",
    b"\x7f",
    b"\x1b[2J",
    b"[" * 2000,
    b'{"a":' * 2000,
    b"9" * 5000,
    b"1e400",
    b"-",
    b"NaN",
    b"null",
    b"{}",
    b"[]",
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    b"\0\0\x01\0\0\0\0\0",
)

odd_values = (
    st.sampled_from(NUMBERS)
    | st.sampled_from(TEXTS)
    | st.sampled_from([None, True, False, [], {}, [[]], [None], {"": ""}, {"a": {"b": []}}])
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.lists(st.integers(-2, 5), max_size=6)
)


def mutated(values: Sequence[T], change: Callable[[T, Random], T], *, most: int = 4) -> SearchStrategy[T]:
    """Return a strategy that applies `change` up to `most` times to one of `values`."""

    def build(value: T, random: Random, count: int) -> T:
        for _ in range(count):
            value = change(value, random)
        return value

    return st.builds(build, st.sampled_from(values), st.randoms(use_true_random=True), st.integers(1, most))


def sometimes_grown(
    common: SearchStrategy[bytes], starts: Sequence[bytes], most: int
) -> SearchStrategy[bytes]:
    """Return `common`; for one input of 50, a valid one in which a short piece is repeated to `most` bytes.

    Work that grows faster than the input shows only in large ones.
    """

    def grow(start: bytes, random: Random) -> bytes:
        place = random.randrange(len(start) + 1)
        own = start[place : place + random.randrange(1, 20)] or b"a"
        piece = random.choice((own, own, *(text_bytes(text) for text in TEXTS if 0 < len(text) < 10)))
        return start[:place] + piece * ((most - len(start)) // len(piece)) + start[place:]

    rare = st.builds(grow, st.sampled_from(starts), st.randoms(use_true_random=True))
    return st.sampled_from([common] * 49 + [rare]).flatmap(lambda strategy: strategy)


def change_bytes(data: bytes, random: Random) -> bytes:
    """Return `data` with one damage: changed bits, or a piece that is removed, repeated or inserted."""
    start = random.randrange(len(data) + 1)
    if random.random() < 0.5:  # the beginning of a file is its header
        start = min(start, random.randrange(64))
    stop = min(len(data), start + random.choice((1, 1, 2, 4, 8, 16, 100, 1000)))
    piece = data[start:stop]
    match random.randrange(8):
        case 0:
            return data[:start] + bytes(byte ^ (1 << random.randrange(8)) for byte in piece) + data[stop:]
        case 1:
            return data[:start] + random.randbytes(len(piece)) + data[stop:]
        case 2:
            return data[:start] + data[stop:]
        case 3:
            return data[:start] + piece * random.choice((2, 3, 50)) + data[stop:]
        case 4:
            return data[:start]
        case 5:
            place = random.randrange(len(data) + 1)
            return data[:place] + piece + data[place:]
        case 6:
            number = random.choice([n for n in NUMBERS if isinstance(n, int) and 0 <= n < 2**64])
            return data[:start] + number.to_bytes(8, "little")[: random.choice((1, 2, 4, 8))] + data[stop:]
        case _:
            return data[:start] + random.choice(PIECES) + data[start if random.random() < 0.5 else stop :]


def change_text(text: str, random: Random) -> str:
    """Return `text` with one damage: a line or a word that is removed, repeated, moved or replaced."""
    separator = random.choice(("\n", "\n", " ", "=", '"', ","))
    parts = text.split(separator)
    place = random.randrange(len(parts))
    match random.randrange(5):
        case 0:
            del parts[place]
        case 1:
            parts[place:place] = [parts[place]] * random.choice((1, 1, 1, 100))
        case 2:
            other = random.randrange(len(parts))
            parts[place], parts[other] = parts[other], parts[place]
        case 3:
            parts[place] = str(random.choice((*TEXTS, *NUMBERS)))
        case _:
            start = random.randrange(len(parts[place]) + 1)
            odd = random.choice((*TEXTS, *(chr(random.randrange(1, 256)) for _ in range(20))))
            parts[place] = parts[place][:start] + odd + parts[place][start + random.randrange(2) :]
    return separator.join(parts)


def text_bytes(text: str) -> bytes:
    """Return UTF-8, with lone surrogates as three bytes, which is what some programs write."""
    return text.encode("utf-8", errors="surrogatepass")


def change_json(value: Any, random: Random) -> Any:
    """Return a JSON value with one damage: an entry that is removed, repeated, renamed or replaced."""
    changed = json.loads(json.dumps(value))
    place, key = _random_entry(changed, random)
    if place is None:
        return _odd(random)
    match random.randrange(5):
        case 0:
            del place[key]
        case 1 if isinstance(place, dict):
            place[str(random.choice(TEXTS))] = place[key]
        case 2 if isinstance(place, dict):
            place[str(random.choice(TEXTS))] = place.pop(key)
        case 3:
            place[key] = [place[key]] if random.random() < 0.5 else {"a": place[key]}
        case _:
            place[key] = _odd(random)
    return changed


def _odd(random: Random) -> Any:
    return random.choice((*NUMBERS, *TEXTS, None, True, [], {}, [1, 2, 3], [-1], [[1]], {"a": 1}, ["a"]))


def _random_entry(value: Any, random: Random) -> tuple[Any, Any]:
    """Return a random container in a JSON value and a random key of it; (None, None) if all are empty."""
    containers: list[Any] = []
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict | list) and item:
            containers.append(item)
            waiting += cast("dict[str, Any]", item).values() if isinstance(item, dict) else item
    if not containers:
        return None, None
    place = random.choice(containers)
    keys = list(place) if isinstance(place, dict) else range(len(place))
    return place, random.choice(keys)
