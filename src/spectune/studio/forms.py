"""Forms for the commands on files, made from the records of their options."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from spectune.cli.command import CommandSpec, placeholder
from spectune.cli.commands import COMMANDS
from spectune.operation import OptionField, option_fields

TOOLS = (
    "inspect", "split", "verify", "rebuild", "export", "slice", "merge", "convert", "null", "sample",
    "compare",
)  # fmt: skip
# The name that a form suggests for what a command writes: a file, or a folder.
OUTPUT_NAMES = {
    ("inspect", "plot"): "spectrum.png",
    ("split", "out"): "split",
    ("rebuild", "out"): "rebuilt.safetensors",
    ("export", "out"): "lora.safetensors",
    ("slice", "out"): "sliced.safetensors",
    ("merge", "out"): "merged.safetensors",
    ("convert", "out"): "converted.safetensors",
    ("null", "out"): "null.safetensors",
    ("sample", "out"): "pictures",
    ("sample", "sheet"): "sheet.png",
    ("compare", "out"): "compare.png",
}
# Options that only a terminal needs, or that a form answers in another way.
_HIDDEN = {"per_layer"}


@dataclass(frozen=True)
class Control:
    """One field of a form."""

    name: str
    label: str
    kind: str  # check, choice, number, lines, file or text
    help: str
    required: bool
    main: bool  # shown at once; the others are below More options
    value: str  # suggested, or the default
    default: str  # a value that need not be passed
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    whole: bool = False  # a number without a fraction


@dataclass(frozen=True)
class Tool:
    """One command as a form."""

    name: str
    summary: str
    about: str
    controls: tuple[Control, ...]


def tool_of(name: str, output: Path) -> Tool:
    """Return the form of a command. Suggested names of outputs are free ones in the folder `output`."""
    command = next(one for one in COMMANDS if one.name == name)
    text = " ".join((command.options.__doc__ or "").split())
    summary, _, about = text.partition(". ")
    fields = [field for field in option_fields(command.options) if field.name not in _HIDDEN]
    controls = [_control(command, field, output) for field in fields]
    return Tool(name, summary.rstrip("."), about, tuple(sorted(controls, key=lambda one: not one.main)))


def _control(command: CommandSpec, field: OptionField, output: Path) -> Control:
    suggested = OUTPUT_NAMES.get((command.name, field.name))
    value = str(free_path(output / suggested)) if suggested else _default(field)
    return Control(
        name=field.name,
        label=_words(field.name),
        kind=_kind(field, suggested is not None),
        help=_help(command, field),
        required=field.required,
        main=field.argument or field.required or suggested is not None,
        value=value,
        default=_default(field),
        choices=field.choices,
        minimum=field.minimum,
        maximum=field.maximum,
        whole=field.kind is int,
    )


def _kind(field: OptionField, is_output: bool) -> str:
    if field.kind is bool:
        return "check"
    if field.choices:
        return "choice"
    if field.many:
        return "lines"
    if field.kind in (int, float):
        return "number"
    return "file" if field.kind is Path and not is_output else "text"


def _default(field: OptionField) -> str:
    if field.default is None or field.required:
        return ""
    if field.many:
        return "\n".join(map(str, field.default))
    return str(field.default).lower() if field.kind is bool else str(field.default)


def _help(command: CommandSpec, field: OptionField) -> str:
    """Return the help text with the labels of the form in place of the names of fields."""
    names = {other.name for other in option_fields(command.options)}
    text = re.sub(r"`(\w+)`", lambda match: _words(match[1]) if match[1] in names else match[0], field.help)
    shape = placeholder(field)
    return f"{text} One per line, as {shape.removesuffix('...')}." if field.many and ":" in shape else text


def _words(name: str) -> str:
    text = name.replace("_", " ")
    return text[:1].upper() + text[1:]


def free_path(path: Path) -> Path:
    """Return the path, or the first with a number that does not exist."""
    numbered: Iterable[Path] = (path.with_stem(f"{path.stem}-{number}") for number in range(2, 10_000))
    return next(one for one in (path, *numbered) if not one.exists())
