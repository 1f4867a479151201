"""docs/reference/recipe-keys.md: every key of a recipe, made from the sections and the optimizer options."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from spectune.training.optim.kinds import OPTIMIZERS
from spectune.training.recipe.recipe import Recipe, section_of
from spectune.training.recipe.sections.base import OneOf

INTRODUCTION = """\
# Recipe keys

Every key of a recipe. `spectune train recipe.toml --set section.key=value` replaces one for a single run.

```bash
spectune train recipe.toml --set run.steps=200 --set optimizer.learning_rate=1e-4
```

Unknown keys are errors. Relative paths are relative to the folder of the recipe. A key whose default is
*required* must be given; *none* means that the key is left out.
"""
WORDS: dict[Any, str] = {
    int: "integer",
    float: "number",
    bool: "boolean",
    str: "string",
    Path: "path",
    Any: "any value",
}


def recipe_reference() -> str:
    """Return the page: Markdown tables of the keys of each section and of the options of each optimizer."""
    parts = [INTRODUCTION]
    for name, field in Recipe.model_fields.items():
        parts += _section_tables(name, field)
    for name, kind in OPTIMIZERS.items():
        rate = f"Default learning rate: {_toml(kind.learning_rate)}."
        parts.append(f"## `[optimizer.options]` of `{name}`\n\n{_text(kind.options)} {rate}\n")
        parts.append(_table(kind.options.model_fields.items()))
    return "\n".join(parts)


def _section_tables(name: str, field: FieldInfo) -> Iterator[str]:
    """Yield the heading, description and table of a section, then those of its subsections."""
    section = section_of(field.annotation)
    assert section is not None, f"{name} is not a section"
    heading = f"[[{name}]]" if get_origin(field.annotation) is tuple else f"[{name}]"
    below = {key: own for key, own in section.model_fields.items() if section_of(own.annotation)}
    yield f"## `{heading}`\n\n{_text(section)}\n"
    yield _table((key, own) for key, own in section.model_fields.items() if key not in below)
    for key, own in below.items():
        yield from _section_tables(f"{name}.{key}", own)


def _text(section: type[BaseModel]) -> str:
    return inspect.cleandoc(section.__doc__ or "")


def _table(keys: Iterable[tuple[str, FieldInfo]]) -> str:
    rows = ["| key | type | default | help |", "| --- | --- | --- | --- |"]
    for key, field in keys:
        kind = type_in_words(field.annotation, field.metadata)
        cells = (f"`{key}`", kind, _default(field), field.description or "")
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def type_in_words(annotation: Any, constraints: Sequence[Any] = ()) -> str:
    """Describe a type in TOML terms, with its range: `integer ≥ 1`, `list: path`."""
    if get_origin(annotation) is Annotated:
        annotation, *inner = get_args(annotation)
        own = [item for one in inner for item in (one.metadata if isinstance(one, FieldInfo) else [one])]
        return type_in_words(annotation, [*constraints, *own])
    arguments = get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(type_in_words(one, constraints) for one in arguments if one is not NoneType)
    if get_origin(annotation) is Literal:
        return _one_of(arguments)
    if get_origin(annotation) is tuple:
        if len(arguments) == 2 and arguments[1] is not Ellipsis:
            return f"pair: {type_in_words(arguments[0])}"
        return f"list: {type_in_words(arguments[0])}"
    if get_origin(annotation) is dict:
        return "table" if arguments[1] is Any else f"table: {' = '.join(map(type_in_words, arguments))}"
    for one in constraints:
        if isinstance(one, AfterValidator) and isinstance(one.func, OneOf):
            return _one_of(one.func.names)
    return f"{WORDS[annotation]}{_range(constraints)}"


def _one_of(names: Iterable[str]) -> str:
    *others, last = (f"`{name}`" for name in names)
    return f"{', '.join(others)} or {last}" if others else last


def _range(constraints: Iterable[Any]) -> str:
    """Return the bounds of a number, such as ` ≥ 1` or ` 0 to 1`, or an empty string."""
    signs: dict[type, tuple[str, str]] = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}
    bounds = {
        signs[type(one)][1]: f"{getattr(one, signs[type(one)][0]):,g}"
        for one in constraints
        if type(one) in signs
    }
    if bounds.keys() == {"≥", "≤"}:
        return f" {bounds['≥']} to {bounds['≤']}"
    return f" {', '.join(f'{sign} {bound}' for sign, bound in bounds.items())}" if bounds else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "none" if value is None else f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
