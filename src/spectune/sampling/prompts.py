"""Read a file of prompts in the format of sd-scripts: lines with options, TOML or JSON.

    # a comment
    a red balloon, outdoors --n blurry, text --w 832 --h 1216 --d 7 --l 5 --s 28 --ss euler_a

In TOML, `[prompt]` holds the defaults of all `[[prompt.subset]]`. In JSON, a list holds lines or objects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from spectune.errors import InputError, counted, did_you_mean, printable
from spectune.files.text import UTF8, UnreadableText, load_json, load_toml, read_text
from spectune.model.text import has_weights
from spectune.sampling.generate import Request, SampleSettings, check_sampler_name
from spectune.sampling.limits import LARGEST_SIDE, MOST_GUIDANCE, SMALLEST_SIDE

_LARGEST = 1024 * 1024  # bytes
_EXAMPLE = "a line looks like this: a red balloon --n blurry --w 1024 --h 1024 --d 1 --l 5 --s 25"


@dataclass(frozen=True)
class Prompt:
    """A prompt with the settings that it is drawn with."""

    request: Request
    settings: SampleSettings


@dataclass(frozen=True)
class _Value:
    """How the text of an option becomes a value."""

    expected: str
    convert: Callable[[str], Any]


def _whole(low: int, high: int) -> _Value:
    def convert(text: str) -> int:
        if not low <= int(text) <= high:
            raise ValueError
        return int(text)

    return _Value(f"a whole number from {low} to {high}", convert)


def _scale(text: str) -> float:
    if not 0 <= float(text) <= MOST_GUIDANCE:
        raise ValueError
    return float(text)


def _seed(text: str) -> int | None:
    if not -(2**63) <= int(text) < 2**63:
        raise ValueError
    return None if int(text) < 0 else int(text)  # -1 means that there is no seed


_TEXT = _Value("text", str)
_VALUES: Mapping[str, _Value] = {
    "prompt": _TEXT,
    "negative": _TEXT,
    "width": _whole(SMALLEST_SIDE, LARGEST_SIDE),
    "height": _whole(SMALLEST_SIDE, LARGEST_SIDE),
    "seed": _Value("a whole number", _seed),
    "cfg": _Value(f"a number from 0 to {MOST_GUIDANCE}", _scale),
    "steps": _whole(1, 1000),
    "sampler": _Value("the name of a sampler", check_sampler_name),
}
# The names of these fields after `--` in a line.
_OPTIONS: Mapping[str, str] = {
    "n": "negative",
    "w": "width",
    "h": "height",
    "d": "seed",
    "l": "cfg",
    "s": "steps",
    "ss": "sampler",
}
# The names of these fields in TOML and JSON.
_KEYS: Mapping[str, str] = {
    **{field: field for field in _VALUES},
    "negative_prompt": "negative",
    "scale": "cfg",
    "sample_steps": "steps",
    "sample_sampler": "sampler",
}
# What sd-scripts reads for other models.
_UNUSED_OPTIONS = frozenset({"g", "cn", "ctr", "rcfg", "fs", "f", "am"})
_UNUSED_KEYS = frozenset(
    {"guidance_scale", "controlnet_image", "cfg_trunc_ratio", "renorm_cfg", "flow_shift"}
)

Fields = dict[str, Any]


def read_prompts(file: Path, defaults: SampleSettings) -> tuple[list[Prompt], list[str]]:
    """Return the prompts of a file, and notes about its encoding, weights, and options without effect.

    The seed of a prompt without one is its position in the file, counted from 0. So the previews of several
    steps can be compared.

    Raises:
        InputError: The file cannot be read, or an option is unknown or has an invalid value.
    """
    unused: dict[str, None] = {}
    try:
        decoded = read_text(file, largest=_LARGEST)
    except UnreadableText as error:
        raise InputError(
            f"cannot read prompts from {file}: it {error}", hint="save the file as UTF-8"
        ) from error
    notes = [] if decoded.encoding == UTF8 else [f"{file.name} is read as {decoded.encoding}"]
    text = "\n".join(re.split(r"\r\n|\r|\n", decoded.text))
    try:
        entries = list(_entries(text, file.suffix.lower(), unused))
    except ValueError as error:
        raise InputError(f"{file} is not valid {file.suffix[1:].upper()}: {error}") from error
    except InputError as error:
        raise InputError(f"{file}, {error}", hint=error.hint) from error
    if not entries:
        raise InputError(f"{file} has no prompts", hint=_EXAMPLE)
    prompts = [_prompt(fields, number, defaults) for number, fields in enumerate(entries)]
    notes += [f"{file.name}: {', '.join(unused)} has no effect on SDXL"] if unused else []
    if weighted := sum(has_weights(f"{one.request.caption} {one.settings.negative}") for one in prompts):
        notes.append(
            f"{file.name}: {counted(weighted, 'prompt')} with weights like (word:1.2), which are used as text"
        )
    return prompts, notes


def _prompt(fields: Fields, number: int, defaults: SampleSettings) -> Prompt:
    settings = {name: value for name, value in fields.items() if name not in ("prompt", "seed")}
    seed = fields.get("seed")
    return Prompt(
        Request(fields.get("prompt", ""), number if seed is None else seed), replace(defaults, **settings)
    )


def _entries(text: str, suffix: str, unused: dict[str, None]) -> Iterator[Fields]:
    """Yield the fields of each prompt; add options without effect to `unused`."""
    if suffix == ".toml":
        yield from _from_toml(load_toml(text), unused)
    elif suffix == ".json":
        yield from _from_list(load_json(text), unused)
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip() and not line.lstrip().startswith("#"):
                yield _from_line(line, f"line {number}", unused)


def _from_line(line: str, label: str, unused: dict[str, None]) -> Fields:
    # A space and `--` before a letter start an option, also at the start of the line.
    prompt, *options = re.split(r"\s+--(?=[A-Za-z])", f" {line}")
    fields: Fields = {"prompt": prompt.strip()}
    for option in options:
        name, text, *_ = [*option.split(maxsplit=1), ""]
        if name.lower() in _UNUSED_OPTIONS:
            unused[f"--{name}"] = None
            continue
        field = _OPTIONS.get(name.lower())
        if field is None:
            known = ", ".join(f"--{option}" for option in _OPTIONS)
            raise InputError(f"{label}: unknown option --{printable(name)}", hint=f"the options are {known}")
        fields[field] = _converted(field, text.strip(), f"{label}: --{name}")
    return fields


def _from_toml(data: Mapping[str, Any], unused: dict[str, None]) -> Iterator[Fields]:
    """Yield the prompts of `[prompt]` with `[[prompt.subset]]`, or of `[[prompt]]`."""
    table = data.get("prompt")
    if isinstance(table, dict):
        shared = cast("dict[str, Any]", table)
        table = shared.pop("subset", [{}] if shared else [])
        if isinstance(table, list):
            subsets = cast("list[Any]", table)
            table = [shared | subset if isinstance(subset, dict) else subset for subset in subsets]
    yield from _from_list([] if table is None else table, unused)


def _from_list(entries: Any, unused: dict[str, None]) -> Iterator[Fields]:
    if not isinstance(entries, list):
        raise InputError("the content: expected a list of prompts", hint=_EXAMPLE)
    for number, entry in enumerate(cast("list[Any]", entries), start=1):
        label = f"prompt {number}"
        if isinstance(entry, str):
            yield _from_line(entry, label, unused)
        elif isinstance(entry, dict):
            yield _from_table(cast("dict[str, Any]", entry), label, unused)
        else:
            raise InputError(f"{label}: expected a text or a table, found {printable(repr(entry), 60)}")


def _from_table(table: Mapping[str, Any], label: str, unused: dict[str, None]) -> Fields:
    fields: Fields = {}
    for key, value in table.items():
        if key in _UNUSED_KEYS:
            unused[key] = None
        elif key not in _KEYS:
            raise InputError(f"{label}: unknown key `{printable(key)}`{did_you_mean(key, _KEYS)}")
        elif isinstance(value, bool | list | dict):
            raise InputError(
                f"{label}: `{key}` is {printable(repr(value), 60)}: expected {_VALUES[_KEYS[key]].expected}"
            )
        else:
            fields[_KEYS[key]] = _converted(_KEYS[key], str(value), f"{label}: `{key}`")
    return fields


def _converted(field: str, text: str, label: str) -> Any:
    kind = _VALUES[field]
    try:
        return kind.convert(text)
    except InputError as error:
        raise InputError(f"{label}: {error}", hint=error.hint) from error
    except ValueError:
        raise InputError(f"{label} is {text!r}: expected {kind.expected}", hint=_EXAMPLE) from None
