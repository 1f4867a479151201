"""docs/reference/commands.md: every command with its options, made from the options records."""

from __future__ import annotations

import textwrap
from pathlib import Path

from spectune.cli.command import CommandSpec, placeholder, usage_of, with_flags
from spectune.cli.commands import COMMANDS
from spectune.operation import OptionField, flags_of, option_fields

WIDTH = 118
WORDS = {str: "text", int: "integer", float: "number", Path: "path"}

INTRODUCTION = """# Commands

Every command and its options. The Python functions of the same names take the same options, with `_` for `-`
([Python](../guides/python.md)).

```bash
spectune --help
spectune split --help
```

`--json` prints the result as JSON on stdout. Everything else goes to stderr.

Every command also has `--job FOLDER`: it writes its progress to a file for other programs, and they can
stop it. See [Events and flag files](events.md).
"""


def commands_page() -> str:
    """Return the text of the page."""
    sections: list[str] = []
    for command in COMMANDS:
        fields = option_fields(command.options)
        arguments = usage_of([field for field in fields if field.argument])
        usage = " ".join(["spectune", command.name, *([arguments] if arguments else [])])
        summary = textwrap.fill(
            _line(with_flags(command, command.options.__doc__ or "")), WIDTH, break_on_hyphens=False
        )
        lines = [f"## {command.name}", "", summary, ""]
        lines += ["```bash", command.example, "```", "", f"Usage: `{usage} [OPTIONS]`", ""]
        lines += ["| argument or option | value | default | help |", "| --- | --- | --- | --- |"]
        lines += [_row(command, field) for field in fields]
        if command.json:
            lines.append("| `--json` |  |  | Print the result as JSON on stdout. |")
        if command.dry_run:
            lines.append("| `--dry-run` |  |  | Print the plan and stop. |")
        sections.append("\n".join(lines))
    return "\n\n".join([INTRODUCTION.rstrip(), *sections]) + "\n"


def _row(command: CommandSpec, field: OptionField) -> str:
    name = placeholder(field) if field.argument else ", ".join(flags_of(field))
    text = field.off[1] if field.off is not None else field.help
    cells = [
        f"`{name}`",
        _value(field),
        _default(field),
        _line(with_flags(command, text)).replace("|", "\\|"),
    ]
    return "| " + " | ".join(cells) + " |"


def _value(field: OptionField) -> str:
    if field.kind is bool:
        return ""
    text = ", ".join(f"`{choice}`" for choice in field.choices) or WORDS[field.kind]
    if field.minimum is not None and field.maximum is not None:
        return f"{text} {field.minimum:,g} to {field.maximum:,g}"
    if field.minimum is not None:
        return f"{text} ≥ {field.minimum:g}"
    return f"{text}, several times" if field.many else text


def _default(field: OptionField) -> str:
    if field.required:
        return "required"
    if field.kind is bool or field.default in (None, ()):
        return ""
    values = field.default if field.many else [field.default]
    return ", ".join(f"`{value}`" for value in values)


def _line(text: str) -> str:
    return " ".join(text.split())
