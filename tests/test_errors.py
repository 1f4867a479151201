from __future__ import annotations

from spectune.errors import InputError, PairingError, SpectuneError, did_you_mean, some_of


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
