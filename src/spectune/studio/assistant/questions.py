"""The questions that pages may ask, in a fixed table. This module runs in the assistant only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from spectune.cli.command import CommandSpec
from spectune.cli.commands import COMMANDS
from spectune.errors import SpectuneError
from spectune.operation import option_fields, run_operation
from spectune.studio.places import Places

Question = Callable[[Mapping[str, Any], Places], Any]
_COMMANDS = {command.function: command for command in COMMANDS}


def reply(question: str, values: Mapping[str, Any], roots: Sequence[str]) -> Any:
    """Return the answer to a question, as JSON types."""
    if question not in QUESTIONS:
        raise SpectuneError(f"there is no question `{question}`")
    folders = tuple(map(Path, roots))
    places = Places(models=folders, data=(), output=folders[0] if folders else Path("/nowhere"))
    return QUESTIONS[question](values, places)


def explained(error: Exception) -> tuple[str, str | None]:
    """Return (what, hint) of an error."""
    if isinstance(error, SpectuneError):
        return error.what, error.hint
    return f"{type(error).__name__}: {error}", None


def _report_of(name: str) -> Question:
    """Return the question that runs a command that writes nothing, and returns what `--json` prints."""
    command = _COMMANDS[name]

    def ask(values: Mapping[str, Any], places: Places) -> Any:
        options = command.options(**_checked(command, values, places))
        operations, reports = import_module(command.operation), import_module(command.report)
        report = run_operation(getattr(operations, command.function), options)
        return reports.as_json(report, options, 0.0)

    return ask


def _checked(command: CommandSpec, values: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """Return the values of an options record; all paths are inside of the folders."""
    checked = dict(values)
    for field in option_fields(command.options):
        if field.kind is Path and values.get(field.name) is not None:
            value = values[field.name]
            found = [places.inside(str(one)) for one in (value if field.many else [value])]
            checked[field.name] = found if field.many else found[0]
    return checked


def _device(values: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """Return the card of this machine: its name and memory in bytes, None without a card."""
    if not torch.cuda.is_available():
        return {"name": None, "memory": None}
    card = torch.cuda.get_device_properties(0)
    return {"name": card.name, "memory": card.total_memory}


QUESTIONS: Mapping[str, Question] = {
    "device": _device,
    "inspect": _report_of("inspect"),
    "plan": _report_of("plan"),
    "dataset": _report_of("dataset"),
}
