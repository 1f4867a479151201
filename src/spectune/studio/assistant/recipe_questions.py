"""Questions about recipes: check, text, values, a draft, and the import of a kohya command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from spectune.cli.reports.train import dry_run_json
from spectune.errors import InputError, SpectuneError
from spectune.files.text import load_toml
from spectune.interop.kohya.command_line import parse_command
from spectune.interop.kohya.importer import import_command, replaced_by_split
from spectune.interop.kohya.recipe_file import recipe_text
from spectune.ops.new import draft
from spectune.ops.new.prompts import prompts_of, prompts_path
from spectune.ops.options.training import NewOptions, TrainOptions
from spectune.ops.train import plan_train
from spectune.studio.places import Places
from spectune.training.recipe.commented import Setting, commented_recipe, nested
from spectune.training.recipe.file import read_recipe_file, with_absolute_paths
from spectune.training.recipe.recipe import Recipe, problem_of, section_of

_OPTIONS = "optimizer.options"  # a table whose keys depend on the optimizer


def check(values: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """Check a recipe as `train --dry-run` does: `{"problems": [{"key", "what", "hint"}], "forecast"}`.

    Fields: `values`, the sections of the recipe; `folder`, to which its paths are relative; `force`;
    `quick` to check only the keys.
    The key of a problem is `run.steps`, or empty if it is not about one key. Leave out `run.preview` if its
    file is written later.
    """
    try:
        recipe = Recipe.model_validate(with_absolute_paths(values["values"], Path(values["folder"])))
    except ValidationError as error:
        problems = [
            {"key": ".".join(map(str, one["loc"])), "what": problem_of(dict(one)), "hint": None}
            for one in error.errors()
        ]
        return {"problems": problems, "forecast": None}
    outside = list(_outside(recipe, places, ""))
    if outside or values.get("quick"):
        return {"problems": outside, "forecast": None}
    try:
        forecast = plan_train(TrainOptions(recipe, force=bool(values.get("force"))))
    except SpectuneError as error:
        return {"problems": [{"key": "", "what": error.what, "hint": error.hint}], "forecast": None}
    problems = [{"key": "", "what": what, "hint": None} for what in forecast.problems]
    return {"problems": problems, "forecast": dry_run_json(forecast)}


def _outside(section: BaseModel, places: Places, prefix: str) -> Iterator[dict[str, Any]]:
    """Yield a problem for each path of a recipe that is outside of the folders."""
    for name in type(section).model_fields:
        value, key = getattr(section, name), f"{prefix}{name}"
        for place, one in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(one, BaseModel):
                yield from _outside(one, places, f"{key}.{place}." if isinstance(value, tuple) else f"{key}.")
            elif isinstance(one, Path):
                try:
                    places.inside(str(one))
                except SpectuneError as error:
                    yield {"key": key, "what": error.what, "hint": error.hint}


def text(values: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """Return the TOML text of a recipe's `values`, with the first sentence of each key's help."""
    return {
        "text": commented_recipe(list(_settings(values["values"])), head=values.get("head", ""), remarks={})
    }


def _settings(
    data: Mapping[str, Any], section: type[BaseModel] = Recipe, prefix: str = ""
) -> Iterator[Setting]:
    for name, value in data.items():
        key, field = f"{prefix}{name}", section.model_fields.get(name)
        if field is None:
            raise InputError(f"a recipe has no key `{key}`")
        below = section_of(field.annotation)
        is_list = get_origin(field.annotation) is tuple
        if value is None:
            continue
        if below is not None and not is_list:
            if not isinstance(value, Mapping):
                raise InputError(f"`{key}` is a section: expected a table")
            yield from _settings(value, below, f"{key}.")
        elif key == _OPTIONS and isinstance(value, Mapping):
            yield from (Setting(f"{key}.{option}", one, "") for option, one in value.items())
        else:
            help_text = (field.description or "").partition(". ")[0].rstrip(".")
            yield Setting(key, value, help_text)


def recipe_values(values: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """Return the sections of a recipe, with absolute paths: of the file `path`, or of `text` in `folder`."""
    if values.get("path"):
        return {"values": read_recipe_file(places.file(values["path"]))}
    try:
        data = load_toml(values["text"])
    except ValueError as error:
        raise InputError(f"this is not valid TOML: {error}") from error
    return {"values": with_absolute_paths(data, Path(values["folder"]))}


def new(values: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """Return the recipe that `spectune new` would write; it writes nothing.

    Fields: those of NewOptions; `out` is required, and paths in the result are relative to its folder.
    """
    checked = {name: value for name, value in values.items() if value is not None}
    for name in ("model", "folder", "out"):
        checked[name] = places.inside(str(checked.get(name, "")))
    made = draft(NewOptions(**checked))
    return {
        "values": with_absolute_paths(nested(made.settings), made.path.parent),
        "text": made.text,
        "prompts": prompts_of(made.captions),
        "prompts_path": prompts_path(made.path),
        "pictures": made.pictures,
        "steps": made.steps,
        "notes": made.notes,
        "warnings": made.warnings,
    }


def recipe_import(values: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """Convert a pasted kohya command. Fields: `command`, a text; `folder`, to which its paths are relative.

    Files that the command names, such as a data set configuration, are not read.
    """
    folder = places.inside(str(values["folder"]))
    command = parse_command(values["command"])
    split = replaced_by_split(command)
    if split is not None:
        return {"replaced_by": split, "values": None, "text": None, "flags": [], "notes": []}
    imported = import_command(command, folder=Path())
    flags = [
        {"flag": str(one.flag), "verdict": one.verdict, "why": one.why.removeprefix("; "), "text": str(one)}
        for one in imported.results
    ]
    return {
        "replaced_by": None,
        "values": with_absolute_paths(nested(imported.settings), folder),
        "text": recipe_text(imported, command="spectune train recipe.toml"),
        "flags": flags,
        "notes": imported.notes,
        "understood": imported.understood,
    }
