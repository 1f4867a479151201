"""A recipe as a file to read and to change, with a comment for where each value comes from."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence

from pydantic import BaseModel

from spectune.interop.kohya.importer import ImportedRecipe, Setting, kept_out, nested
from spectune.interop.kohya.outcomes import toml_value
from spectune.training.recipe.file import Recipe

_RESIDUAL = """\
# The guide's pair: its diff model, and its extract as the principal. On the original in place of the diff
# model, training is exact from the start:
#   base = "original.safetensors"     (and no `residual`)
#   form = "delta"                    (the principal stays)
"""
_BASE = """\
# The frame is split off the base when training starts; `spectune split` writes it to a file once for all:
#   principal = "base.principal-r64.safetensors"     (and no `rank`)
"""
_VAE = """\
# No file says how its latents are scaled: for a known autoencoder add name = "eq-kblueleaf" or "eq-anzhc",
# for another one scale, shift and padding.
"""


def recipe_text(conversion: ImportedRecipe, *, command: str) -> str:
    """The file's text; `command` is the one that runs it."""
    lines = [
        f"# {command}",
        "# Made by `spectune recipe import`; behind each value stands the flag it comes from.",
    ]
    for section, settings in _by_section(conversion.settings):
        lines += ["", f"[{section}]", *_remarks(section, settings)]
        lines += [_line(setting) for setting in settings]
    for heading, answers in kept_out(conversion.answers).items():
        lines += ["", f"# Not in here, because {heading}:"]
        lines += [f"#   {' '.join(str(answer).split())}" for answer in answers]
    text = "\n".join(lines) + "\n"
    assert tomllib.loads(text) == nested(conversion.settings), "the file does not say what was checked"
    return text


def _line(setting: Setting) -> str:
    key = setting.key.rpartition(".")[2]
    return f"{key} = {toml_value(setting.value)}  # {' '.join(setting.source.split())}"


def _by_section(settings: Sequence[Setting]) -> Iterator[tuple[str, list[Setting]]]:
    """The settings of each table of the file: sections in the order of a recipe."""
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(setting.key.rpartition(".")[0], []).append(setting)
    order = list(Recipe.model_fields)
    for section in sorted(groups, key=lambda name: (order.index(name.split(".")[0]), name)):
        fields = _fields_of(section)
        yield section, sorted(groups[section], key=lambda setting: _place(setting.key, fields))


def _fields_of(section: str) -> list[str]:
    """The keys of a table in the order of the recipe's own; none where they are free, as the options are."""
    kind: type[BaseModel] = Recipe
    for name in section.split("."):
        below = kind.model_fields[name].annotation
        if not (isinstance(below, type) and issubclass(below, BaseModel)):
            return []
        kind = below
    return list(kind.model_fields)


def _place(key: str, fields: Sequence[str]) -> int:
    name = key.rpartition(".")[2]
    return fields.index(name) if name in fields else len(fields)


def _remarks(section: str, settings: Sequence[Setting]) -> list[str]:
    keys = {setting.key for setting in settings}
    remark: str = ""
    if "model.residual" in keys:
        remark = _RESIDUAL
    elif section == "model":
        remark = _BASE
    elif section == "vae":
        remark = _VAE
    return list(remark.splitlines())
