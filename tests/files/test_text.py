"""JSON and TOML of strangers: what would hang, crash or write files that nothing opens is a ValueError."""

from __future__ import annotations

from typing import Any

import pytest

from spectune.files.text import load_json, load_toml, storable

DIGITS = "9" * 5000


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (nested(100_000), "nested too deeply"),
        (nested(150), "nested too deeply"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested too deeply"),
        (DIGITS, "too many digits"),
        (f'{{"a": [{DIGITS[:200]}]}}', "too many digits"),
        ('{"\\ud800": 1}', "half of a surrogate pair"),
        (b'["\xed\xa0\x80"]', "can't decode"),
        ("[", "line 1 column 2"),
    ],
)
def test_hostile_json_is_a_value_error(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_json(text)


def test_json_keeps_what_is_plain() -> None:
    text = '{"a": [1, -2.5, null, true], "\\ud83d\\ude00": "\\u0000", "b": ' + nested(50) + "}"
    read: Any = load_json(text)
    assert read["a"] == [1, -2.5, None, True]
    assert read["\U0001f600"] == "\0"
    assert load_json('{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(ValueError, match="a name twice"):
        load_json('{"a": 1, "a": 2}', unique=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"a = {nested(100_000)}", "nested too deeply"),
        (f"a = {nested(150)}", "nested too deeply"),
        (f"a = {'{a=' * 3000}1{'}' * 3000}", "nested too deeply"),
        (f"a = {DIGITS}", "too many digits"),
        (f"x = 1\na{'.a' * 100_000} = 1", "line 2 has more than 300 dots"),
        (f"[{'a.' * 5000}a]", "more than 300 dots"),
        (f'x = {{a = "\\"", b{".b" * 5000} = 1}}', "more than 300 dots"),
        (f"a{'.a' * 200} = 1", "nested too deeply"),
        ("a = ", "Invalid value"),
    ],
)
def test_hostile_toml_is_a_value_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_toml(text)


def test_toml_keeps_what_is_plain() -> None:
    assert load_toml("a.b = [1, 'x.y']") == {"a": {"b": [1, "x.y"]}}
    dots = "." * 1000
    text = f'a = "\\"{dots}" # {dots}\nb = \'\\{dots}\''
    assert load_toml(text) == {"a": f'"{dots}', "b": f"\\{dots}"}


def test_texts_that_utf8_cannot_store_are_replaced() -> None:
    assert storable("caf\udce9 \U0001f600") == "caf? \U0001f600"
