from __future__ import annotations

import shlex
from pathlib import Path, PureWindowsPath
from typing import Any, cast

import pytest

from spectune.errors import (
    FileNote,
    InputError,
    PairingError,
    SpectuneError,
    check_all,
    did_you_mean,
    one_line,
    quoted,
    some_of,
)


def test_an_error_has_a_message_and_a_hint() -> None:
    error = InputError("x exists", hint="pass --force")
    assert (str(error), error.what, error.hint, error.exit_code) == (
        "x exists",
        "x exists",
        "pass --force",
        2,
    )
    assert isinstance(PairingError("a"), SpectuneError)
    assert PairingError("a").hint is None


HOSTILE = "a\x1b]0;t\x07\nhint: run this\u202e\u2028\ud800.safetensors"


def test_names_of_strangers_cannot_control_a_terminal() -> None:
    error = InputError(f"no {HOSTILE}", hint=HOSTILE)
    seen = "a\ufffd]0;t\ufffd hint: run this\ufffd\ufffd\ufffd.safetensors"
    assert (error.what, error.hint, str(error)) == (f"no {seen}", seen, f"no {seen}")
    assert str(FileNote(HOSTILE)) == seen
    assert one_line("caf\xe9 \u3000 \u65e5\u672c") == "caf\xe9 \u3000 \u65e5\u672c"


def test_long_values_are_cut_with_their_length() -> None:
    assert one_line(f"tensor {'x' * 1_000_000} is wrong") == (
        f"tensor {'x' * 200}... (1,000,000 characters) is wrong"
    )
    assert len(one_line("x " * 500_000)) < 4100
    assert one_line("y" * 400) == "y" * 400


def test_all_wrong_items_are_one_error() -> None:
    def half(number: int) -> int:
        if number % 2:
            raise InputError(f"{number} is odd", hint=f"add 1 to {number}")
        return number // 2

    assert check_all([2, 4], half) == [1, 2]
    with pytest.raises(InputError, match=r"^3 is odd$"):
        check_all([2, 3], half)
    with pytest.raises(InputError) as caught:
        check_all(range(10), half)
    assert caught.value.what == "1 is odd; 3 is odd; 5 is odd (2 more)"
    assert caught.value.hint == "add 1 to 1; add 1 to 3; add 1 to 5"


def test_did_you_mean() -> None:
    assert did_you_mean("rnak", ["rank", "alpha"]) == "; did you mean `rank`?"
    assert did_you_mean("zzz", ["rank", "alpha"]) == ""


def test_some_of() -> None:
    assert some_of(["a", "b", "c"]) == "a, b, c"
    assert some_of(["a", "b", "c", "d", "e"]) == "a, b, c (2 more)"


@pytest.mark.parametrize(
    ("path", "windows", "expected"),
    [
        ("out/style.safetensors", False, "out/style.safetensors"),
        ("my models/a (1).safetensors", False, '"my models/a (1).safetensors"'),
        ("a,b;c&d@.safetensors", False, '"a,b;c&d@.safetensors"'),
        ("it's.safetensors", False, '"it\'s.safetensors"'),
        ("gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n.safetensors", False, None),
        ("$HOME `x`!.safetensors", False, "'$HOME `x`!.safetensors'"),
        ("C:\\my models\\a.safetensors", True, '"C:/my models/a.safetensors"'),
        ("C:\\models\\$a.safetensors", True, '"C:/models/$a.safetensors"'),
    ],
)
def test_paths_are_one_argument(path: str, windows: bool, expected: str | None) -> None:
    made = quoted(cast("Any", PureWindowsPath(path) if windows else Path(path)), windows=windows)
    assert made == (f'"{path}"' if expected is None else expected)
    if not windows:
        assert shlex.split(made) == [path]
