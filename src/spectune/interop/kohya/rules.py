"""Define the result of importing one flag, and the rules that produce it."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from spectune.errors import printable
from spectune.interop.kohya.command_line import Command, Flag
from spectune.training.recipe.commented import toml_item

Verdict = Literal["taken", "ignored", "unsupported", "unknown"]


@dataclass(frozen=True)
class FlagResult:
    """The recipe keys that a flag sets, or the reason why it sets none."""

    flag: Flag
    verdict: Verdict
    why: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)  # `section.key` of the recipe -> value

    def __str__(self) -> str:
        match self.verdict:
            case "taken":
                values = ", ".join(
                    f"{key} = {toml_item(value).as_string()}" for key, value in self.settings.items()
                )
                return f"{self.flag}: imported as {values}" + (f" ({self.why})" if self.why else "")
            case "ignored":
                return f"{self.flag}: ignored: {self.why}"
            case "unsupported":
                return f"{self.flag}: not supported: {self.why}"
            case "unknown":
                return f"{self.flag}: unknown flag{self.why}"


LARGEST = 2**53  # larger whole numbers are not exact as floats
MEMORY = "run.gradient_checkpointing, run.offload, run.stream and model.quantize control memory"
ZERO = ("0", "0.0")
Results = tuple[FlagResult, ...]
Convert = Callable[[Flag, Command], Results]


@dataclass(frozen=True)
class FlagRule:
    """The rule to import a flag. `summary` is its row in docs/reference/kohya-flags.md."""

    summary: str
    convert: Convert
    max_values: int | None = 1  # 0 for a switch, None for a list of any length


class PathText(str):
    """A path as written, for any operating system, relative to the folder in which the command runs."""

    __slots__ = ()


# ---------------------------------------------------------------- results


def taken(flag: Flag, settings: Mapping[str, Any], why: str = "") -> Results:
    return (FlagResult(flag, "taken", why, settings),)


def ignored(flag: Flag, why: str) -> Results:
    return (FlagResult(flag, "ignored", why),)


def unsupported(flag: Flag, why: str) -> Results:
    return (FlagResult(flag, "unsupported", why),)


# ---------------------------------------------------------------- kinds of rules


def takes(key: str, parse: Callable[[str], Any], note: str = "") -> FlagRule:
    """Return the rule of a flag whose value becomes the value of the recipe's `key`."""

    def convert(flag: Flag, command: Command) -> Results:
        return taken(flag, {key: parse(only_value(flag))}, note)

    return custom(f"`{key}`" + (f"; {note}" if note else ""), convert)


def switches(key: str, value: Any = True, note: str = "") -> FlagRule:
    """Return the rule of a switch that sets the recipe's `key` to `value`."""

    def convert(flag: Flag, command: Command) -> Results:
        return taken(flag, {key: value}, note)

    summary = f"`{key} = {toml_item(value).as_string()}`" + (f"; {note}" if note else "")
    return custom_switch(summary, convert)


def ignores(why: str) -> FlagRule:
    """Return the rule of a flag that changes nothing in spectune."""

    def convert(flag: Flag, command: Command) -> Results:
        return ignored(flag, why)

    return custom(f"ignored: {why}", convert)


def refuses(why: str, *, unless: tuple[str, ...] = ()) -> FlagRule:
    """Return the rule of a flag without counterpart. A value in `unless` has no effect and is ignored."""

    def convert(flag: Flag, command: Command) -> Results:
        value = " ".join(flag.values)
        return ignored(flag, "spectune always does this") if value in unless else unsupported(flag, why)

    exception = f" (ignored if the value is {' or '.join(unless)})" if unless else ""
    return custom(f"not supported: {why}{exception}", convert)


def custom(summary: str, convert: Convert, *, max_values: int | None = 1) -> FlagRule:
    """Return a rule with its own `convert`. If `convert` raises ValueError, the flag is unsupported."""

    def guarded(flag: Flag, command: Command) -> Results:
        try:
            return convert(flag, command)
        except ValueError as error:
            return unsupported(flag, str(error))

    return FlagRule(summary, guarded, max_values)


def custom_switch(summary: str, convert: Convert) -> FlagRule:
    """Return the rule of a switch with its own `convert`."""
    return custom(summary, convert, max_values=0)


def each(names: str, rule: FlagRule, *, prefix: str = "") -> dict[str, FlagRule]:
    """Return the rule for each of some flags. Spaces separate their names, which follow `prefix`."""
    return {prefix + name: rule for name in names.split()}


# ---------------------------------------------------------------- values


def only_value(flag: Flag) -> str:
    """Return the first value of a flag. Raises ValueError if it has none."""
    if not flag.values:
        raise ValueError("it has no value")
    return flag.values[0]


def whole_number(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value.is_integer() or abs(value) >= LARGEST:
        raise ValueError(f"expected a whole number, found `{printable(text, 40)}`")
    return int(value)


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"expected a number, found `{printable(text, 40)}`")
    return value


def path(text: str) -> PathText:
    if not text.strip():
        raise ValueError("expected a path, found an empty value")
    return PathText(text.strip())


def literal(text: str) -> Any:
    """Parse a value of an `*_args` flag as sd-scripts does: as a Python literal, otherwise as text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: deeply nested brackets
        return text
    return list(value) if isinstance(value, tuple) else value
