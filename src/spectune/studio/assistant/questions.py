"""The questions that pages may ask, in a fixed table. This module runs in the assistant only.

The values of inspect, plan, dataset and split_forecast are the fields of the command's record; the answer is
what the command prints with `--json`. The functions in recipe_questions.py describe the others.
All paths are absolute and inside of the folders of the Studio.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from spectune.cli.command import CommandSpec
from spectune.cli.commands import COMMANDS
from spectune.errors import SpectuneError
from spectune.model.device import memory_to_plan, total_memory
from spectune.operation import option_fields, run_operation
from spectune.ops.options.model_files import SplitOptions
from spectune.ops.split import plan_split
from spectune.studio.assistant import picture_questions, recipe_questions
from spectune.studio.assistant.recipe_schema import recipe_schema
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
    return (
        f"{type(error).__name__}: {error}",
        "this is a defect; assistant.log in the Studio's folder has more",
    )


def _report_of(name: str) -> Question:
    """Return the question that runs a command that writes nothing, and returns what `--json` prints."""
    command = _COMMANDS[name]
    operations, reports = import_module(command.operation), import_module(command.report)

    def ask(values: Mapping[str, Any], places: Places) -> Any:
        options = command.options(**_checked(command, values, places))
        report = run_operation(getattr(operations, command.function), options)
        return reports.as_json(report, options, 0.0)

    return ask


def _split_forecast(values: Mapping[str, Any], places: Places) -> Any:
    """Return what `split --dry-run --json` prints."""
    return asdict(plan_split(SplitOptions(**_checked(_COMMANDS["split"], values, places))))


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
    """Return the card of this machine: its name, its memory in bytes, and what a run should plan for."""
    if not torch.cuda.is_available():
        return {"name": None, "memory": None, "to_plan": None}
    return {"name": torch.cuda.get_device_name(0), "memory": total_memory(), "to_plan": memory_to_plan()}


def holds_card() -> bool:
    """Return whether this process keeps memory of a card, which a training would lack."""
    return torch.cuda.is_initialized()


QUESTIONS: Mapping[str, Question] = {
    "device": _device,
    "inspect": _report_of("inspect"),
    "plan": _report_of("plan"),
    "dataset": _report_of("dataset"),
    "pictures": picture_questions.pictures,
    "caption_tokens": picture_questions.caption_tokens,
    "split_forecast": _split_forecast,
    "new": recipe_questions.new,
    "check": recipe_questions.check,
    "recipe_schema": lambda values, places: recipe_schema(),
    "recipe_text": recipe_questions.text,
    "recipe_values": recipe_questions.recipe_values,
    "recipe_import": recipe_questions.recipe_import,
}
