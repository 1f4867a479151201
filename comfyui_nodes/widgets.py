"""Build node inputs from the options records: defaults, ranges, choices and tooltips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spectune.operation import OperationOptions, OptionField, option_fields

Input = tuple[str | list[str], dict[str, Any]]
Options = type[OperationOptions]
_TYPES = {int: "INT", float: "FLOAT", bool: "BOOLEAN", str: "STRING"}
_LARGEST_INT = 4096  # ComfyUI requires a maximum


def widget(options: Options, name: str, **changes: Any) -> Input:
    """Return the widget of an option. `changes` override its settings.

    ComfyUI has no empty number: for an optional number, 0 means None.
    """
    field = _field(options, name)
    if field.choices:
        return list(field.choices), {"default": field.default, "tooltip": field.help} | changes
    settings: dict[str, Any] = {"default": field.default, "tooltip": field.help}
    if field.kind is int:
        settings |= {"default": field.default or 0, "min": field.minimum, "max": _LARGEST_INT}
        if field.optional and not changes:
            settings |= {"min": 0, "tooltip": f"{field.help} 0: the default."}
    return _TYPES[field.kind], settings | changes


def list_widget(entries: Sequence[str], options: Options, name: str) -> Input:
    """Return a list input of `entries`, such as files, with the tooltip of an option."""
    return list(entries), {"tooltip": _field(options, name).help}


def _field(options: Options, name: str) -> OptionField:
    return next(field for field in option_fields(options) if field.name == name)
