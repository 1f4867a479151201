"""Build the inputs of nodes from the options records: names, defaults, ranges, choices and tooltips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spectune.operation import OperationOptions, OptionField, option_fields

Input = tuple[str | list[str], dict[str, Any]]
Options = type[OperationOptions]
DEFAULT = "default"  # the choice for None
_LARGEST = {int: 4096, float: 4096.0}  # ComfyUI requires a maximum
_OWN_NAMES = {"force": "overwrite"}


def widgets(options: Options, *left_out: str) -> dict[str, Input]:
    """Return a widget for each option that is not a file and not left out.

    Widgets have no empty value: 0, an empty text and `default` mean None for an option that may be None.
    """
    return {name: _widget(field) for name, field in _named(options) if field.name not in left_out}


def values(options: Options, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an operation, from the inputs of a node. Inverse: `widgets`."""
    fields = dict(_named(options))
    return {fields[name].name: _value(fields[name], value) for name, value in inputs.items()}


def list_widget(entries: Sequence[str], options: Options, name: str) -> Input:
    """Return a list input of `entries`, such as files, with the tooltip of an option."""
    return list(entries), {"tooltip": help_of(options, name)}


def help_of(options: Options, name: str) -> str:
    """Return the help text of an option."""
    return next(field.help for field in option_fields(options) if field.name == name)


def _named(options: Options) -> Iterator[tuple[str, OptionField]]:
    for field in option_fields(options):
        if field.kind is not Path:
            yield _OWN_NAMES.get(field.name, field.name), field


def _widget(field: OptionField) -> Input:
    default, tooltip = field.default, field.help
    if field.choices:
        none = [DEFAULT] if field.optional else []
        return [*none, *field.choices], {"default": DEFAULT if none else default, "tooltip": tooltip}
    if field.kind is bool:
        return "BOOLEAN", {"default": default, "tooltip": tooltip}
    if field.kind is str or field.many:
        text = ",".join(default or ()) if field.many else default or ""
        return "STRING", {"default": text, "tooltip": tooltip}
    limits = {"min": field.minimum or 0, "max": field.maximum or _LARGEST[field.kind]}
    if field.kind is float:
        limits |= {"step": 0.001, "round": False}
    if field.optional:
        limits["min"], default, tooltip = 0, default or 0, f"{tooltip} 0: not set."
    return field.kind.__name__.upper(), {"default": default, "tooltip": tooltip, **limits}


def _value(field: OptionField, value: Any) -> Any:
    if field.optional and value in (0, "", DEFAULT):
        return None
    return (value,) if field.many else value
