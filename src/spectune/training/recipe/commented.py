"""Write a recipe as TOML with a comment at each value."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import tomlkit
from pydantic import BaseModel
from tomlkit.items import AoT, Item, Table

from spectune.errors import InputError, visible
from spectune.files.text import is_storable
from spectune.training.recipe.recipe import Recipe

TABLES = ("data.sets",)  # settings that are lists of tables: they follow all other keys of their section


@dataclass(frozen=True)
class Setting:
    """A key of the recipe with its value, and a comment: its source or its meaning."""

    key: str  # with its section: `data.bucket.min_px`
    value: Any
    source: str


def commented_recipe(
    settings: Sequence[Setting], *, head: str, remarks: Mapping[str, str], tail: Sequence[str] = ()
) -> str:
    """Return the text of a recipe. Sections and keys have the order of the reference.

    Args:
        settings: The values with their comments.
        head: Comment at the top.
        remarks: Comments at the top of a section, by its name.
        tail: Comments at the end, each after an empty line.
    """
    document = tomlkit.document()
    _add_comment(document, head)
    for section, members in _by_section(settings):
        table = tomlkit.table()
        _add_comment(table, remarks.get(section, ""))
        for setting in members:
            name = setting.key.rpartition(".")[2]
            if setting.key in TABLES:
                table.add(name, _tables(setting))
            else:
                item = toml_item(setting.value)
                table.add(name, item.comment(one_line(setting.source)) if setting.source else item)
        *parents, name = section.split(".")
        place: Any = document
        for parent in parents:
            place = place.setdefault(parent, tomlkit.table(is_super_table=True))
        place.add(name, table)
    for text in tail:
        document.add(tomlkit.nl())
        _add_comment(document, text)
    written = tomlkit.dumps(document)
    if not is_storable(written):
        wrong = [setting.key for setting in settings if not is_storable(str(setting.value))]
        raise InputError(
            f"the name in {', '.join(wrong)} is not Unicode, but a recipe is",
            hint="rename the file or folder",
        )
    assert tomllib.loads(written) == nested(settings), "the text differs from the checked recipe"
    return written


def _tables(setting: Setting) -> AoT:
    """Return the value of a setting as [[tables]]. The first one has a comment on the source."""
    tables = tomlkit.aot()
    for place, values in enumerate(setting.value):
        table = tomlkit.table()
        if place == 0:
            _add_comment(table, one_line(setting.source))
        for key, value in values.items():
            table.add(key, toml_item(value))
        tables.append(table)
    return tables


def nested(settings: Sequence[Setting]) -> dict[str, Any]:
    """Return the settings as nested dictionaries, the input of `parse_recipe`."""
    data: dict[str, Any] = {}
    for setting in settings:
        *sections, key = setting.key.split(".")
        place = data
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = setting.value
    return data


def toml_item(value: Any) -> Item:
    """Return `value` as a TOML item. A Windows path becomes a literal string, which needs no escapes."""
    if isinstance(value, list | tuple):
        array = tomlkit.array()
        for element in cast("list[Any]", value):
            array.append(toml_item(element))
        return array
    if isinstance(value, dict):
        table = tomlkit.inline_table()
        for key, element in cast("dict[str, Any]", value).items():
            table.append(key, toml_item(element))
        return table
    if isinstance(value, str) and "\\" in value and "'" not in value and value.isprintable():
        return tomlkit.string(str(value), literal=True)
    return tomlkit.item(str(value) if isinstance(value, str) else value)


def one_line(text: str) -> str:
    """Return a text with single spaces for line breaks and runs of spaces, without control characters."""
    return visible(" ".join(text.split()))


def _add_comment(container: tomlkit.TOMLDocument | Table, text: str) -> None:
    for line in text.splitlines():
        container.add(tomlkit.comment(visible(line)))  # the name of a file may have control characters


def _by_section(settings: Sequence[Setting]) -> Iterator[tuple[str, list[Setting]]]:
    """Yield the settings of each table. Tables and keys are in the order of a recipe."""
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(setting.key.rpartition(".")[0], []).append(setting)
    order = list(Recipe.model_fields)
    for section in sorted(groups, key=lambda name: (order.index(name.split(".")[0]), name)):
        fields = _fields_of(section)
        members = sorted(groups[section], key=lambda one: (one.key in TABLES, _place(one.key, fields)))
        yield section, members


def _fields_of(section: str) -> list[str]:
    """Return the keys of a table in the order of a recipe, or [] if it allows any key, as the options do."""
    kind: type[BaseModel] = Recipe
    for name in section.split("."):
        annotation = kind.model_fields[name].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        kind = annotation
    return list(kind.model_fields)


def _place(key: str, fields: Sequence[str]) -> int:
    name = key.rpartition(".")[2]
    return fields.index(name) if name in fields else len(fields)
