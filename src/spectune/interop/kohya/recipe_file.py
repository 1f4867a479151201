"""Write an imported recipe as TOML, with a comment that names the source of each value."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from typing import Any

import tomlkit
from pydantic import BaseModel
from tomlkit.items import AoT, Table

from spectune.interop.kohya.importer import ImportedRecipe, Setting, nested
from spectune.interop.kohya.rules import toml_item
from spectune.training.recipe.recipe import Recipe

TABLES = ("data.sets",)  # settings that are lists of tables: they follow all other keys of their section
_RESIDUAL = """\
The pair of the guide: the diff model is the residual, the extract is the principal. To train without the
rounding of the pair, use the original instead of the diff model:
  base = "original.safetensors"     (and no `residual`)
  form = "delta"                    (keep `principal`)"""
_BASE = """\
The frame is computed from the base when training starts. To compute it only once, run `spectune split`:
  principal = "base.principal-r64.safetensors"     (and no `rank`)"""
_VAE = """\
A VAE file does not declare the scaling of its latents. For a known VAE add name = "eq-kblueleaf" or
"eq-anzhc"; for any other add scale, shift and padding."""


def recipe_text(imported: ImportedRecipe, *, command: str) -> str:
    """Return the text of the recipe. Its first line is `command`, which runs it."""
    document = tomlkit.document()
    _add_comment(
        document, f"{command}\nWritten by `spectune recipe import`. The comment of each value names its flag."
    )
    for section, settings in _by_section(imported.settings):
        table = tomlkit.table()
        _add_comment(table, _remark(section, settings))
        for setting in settings:
            name = setting.key.rpartition(".")[2]
            if setting.key in TABLES:
                table.add(name, _tables(setting))
            else:
                table.add(name, toml_item(setting.value).comment(_one_line(setting.source)))
        *parents, name = section.split(".")
        place: Any = document
        for parent in parents:
            place = place.setdefault(parent, tomlkit.table(is_super_table=True))
        place.add(name, table)
    for heading, verdicts in (("Ignored", ("ignored",)), ("Not supported", ("unsupported", "unknown"))):
        lines = [f"  {_one_line(str(result))}" for result in imported.results if result.verdict in verdicts]
        if lines:
            document.add(tomlkit.nl())
            _add_comment(document, "\n".join([f"{heading}:", *lines]))
    text = tomlkit.dumps(document)
    assert tomllib.loads(text) == nested(imported.settings), "the text differs from the checked recipe"
    return text


def _tables(setting: Setting) -> AoT:
    """Return the value of a setting as [[tables]]. The first one has a comment on the source."""
    tables = tomlkit.aot()
    for place, values in enumerate(setting.value):
        table = tomlkit.table()
        if place == 0:
            _add_comment(table, _one_line(setting.source))
        for key, value in values.items():
            table.add(key, toml_item(value))
        tables.append(table)
    return tables


def _add_comment(container: tomlkit.TOMLDocument | Table, text: str) -> None:
    for line in text.splitlines():
        container.add(tomlkit.comment(line))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _by_section(settings: Sequence[Setting]) -> Iterator[tuple[str, list[Setting]]]:
    """Yield the settings of each table. Tables and keys are in the order of a recipe."""
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(setting.key.rpartition(".")[0], []).append(setting)
    order = list(Recipe.model_fields)
    for section in sorted(groups, key=lambda name: (order.index(name.split(".")[0]), name)):
        fields = _fields_of(section)
        yield (
            section,
            sorted(groups[section], key=lambda item: (item.key in TABLES, _place(item.key, fields))),
        )


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


def _remark(section: str, settings: Sequence[Setting]) -> str:
    if any(setting.key == "model.residual" for setting in settings):
        return _RESIDUAL
    return {"model": _BASE, "vae": _VAE}.get(section, "")
