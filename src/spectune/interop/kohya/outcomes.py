"""What becomes of a flag: the record, and the kinds of rules that make it."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from spectune.interop.kohya.command_line import Command, Given

Verdict = Literal["taken", "ignored", "unsupported", "unknown"]


@dataclass(frozen=True)
class Answer:
    """What becomes of one flag."""

    given: Given
    verdict: Verdict
    why: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)  # `section.key` of the recipe -> value

    def __str__(self) -> str:
        match self.verdict:
            case "taken":
                values = ", ".join(f"{key} = {toml_value(value)}" for key, value in self.settings.items())
                return f"{self.given}: taken over as {values}" + (f" ({self.why})" if self.why else "")
            case "ignored":
                return f"{self.given}: ignored because {self.why}"
            case "unsupported":
                return f"{self.given}: not supported: {self.why}"
            case "unknown":
                return f"{self.given}: unknown flag{self.why}"


Judge = Callable[[Given, Command], tuple[Answer, ...]]


@dataclass(frozen=True)
class FlagRule:
    """How flags of one name are judged; `says` is its line in docs/reference/kohya-flags.md."""

    says: str
    judge: Judge
    values: int | None = 1  # how many the flag takes: 0 for a switch, None for a list


class PathText(str):
    """A path as it was written, of whichever system; relative to the folder the command runs in."""

    __slots__ = ()


# ---------------------------------------------------------------- answers


def taken(given: Given, settings: Mapping[str, Any], why: str = "") -> tuple[Answer, ...]:
    return (Answer(given, "taken", why, settings),)


def ignored(given: Given, because: str) -> tuple[Answer, ...]:
    return (Answer(given, "ignored", because),)


def unsupported(given: Given, why: str) -> tuple[Answer, ...]:
    return (Answer(given, "unsupported", why),)


# ---------------------------------------------------------------- kinds of rules


def takes(key: str, read: Callable[[str], Any], why: str = "") -> FlagRule:
    """The value becomes the value of `key`."""

    def judge(given: Given, command: Command) -> tuple[Answer, ...]:
        if not given.values:
            return unsupported(given, "it has no value")
        try:
            value = read(given.values[0])
        except ValueError as error:
            return unsupported(given, str(error))
        return taken(given, {key: value}, why)

    return FlagRule(f"`{key}`" + (f"; {why}" if why else ""), judge)


def switches(key: str, value: Any = True, why: str = "") -> FlagRule:
    """The switch sets `key` to `value`."""

    def judge(given: Given, command: Command) -> tuple[Answer, ...]:
        return taken(given, {key: value}, why)

    return FlagRule(f"`{key} = {toml_value(value)}`" + (f"; {why}" if why else ""), judge, values=0)


def ignores(because: str) -> FlagRule:
    def judge(given: Given, command: Command) -> tuple[Answer, ...]:
        return ignored(given, because)

    return FlagRule(f"ignored: {because}", judge)


def refuses(why: str, *, unless: tuple[str, ...] = ()) -> FlagRule:
    """Not supported, `unless` the value is one of those that change nothing."""

    def judge(given: Given, command: Command) -> tuple[Answer, ...]:
        value = " ".join(given.values)
        return ignored(given, "that is how spectune does it") if value in unless else unsupported(given, why)

    nothing = f" (ignored where it is {' or '.join(unless)})" if unless else ""
    return FlagRule(f"not supported: {why}{nothing}", judge)


def guarded(judge: Judge) -> Judge:
    """`judge`, where a value that does not read is not supported."""

    def safe(given: Given, command: Command) -> tuple[Answer, ...]:
        try:
            return judge(given, command)
        except ValueError as error:
            return unsupported(given, str(error))

    return safe


def only(given: Given) -> str:
    """The value of a flag; ValueError where there is none."""
    if not given.values:
        raise ValueError("it has no value")
    return given.values[0]


# ---------------------------------------------------------------- values


def whole(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value.is_integer():
        raise ValueError(f"expected a whole number, got `{text}`")
    return int(value)


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"expected a number, got `{text}`")
    return value


def path(text: str) -> PathText:
    if not text.strip():
        raise ValueError("expected a path, got nothing")
    return PathText(text.strip())


def paths(text: str) -> list[PathText]:
    return [path(text)]


def words(text: str) -> str:
    return text


def literal(text: str) -> Any:
    """A value as sd-scripts reads those of its `*_args`: a Python literal, else the text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return list(value) if isinstance(value, tuple) else value


def toml_value(value: Any) -> str:
    """`value` as TOML writes it."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case list() | tuple():
            return f"[{', '.join(map(toml_value, value))}]"
        case _:
            return _toml_string(str(value))


def _toml_string(text: str) -> str:
    if "\\" in text and not re.search(r"['\x00-\x08\x0a-\x1f\x7f]", text):
        return f"'{text}'"  # a literal string, so that Windows paths read as they are
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda sign: f"\\u{ord(sign[0]):04x}", escaped) + '"'
