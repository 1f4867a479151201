from __future__ import annotations

import shlex
from pathlib import Path, PureWindowsPath
from typing import Any, cast

import pytest

from spectune.errors import InputError, PairingError, SpectuneError, did_you_mean, quoted, some_of


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
