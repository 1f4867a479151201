"""The recipe as a form and as text: load, edit, check, save, start."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from spectune.errors import InputError
from spectune.files.rename import replace_text
from spectune.studio import finding
from spectune.studio.pages import Space
from spectune.studio.places import plain_name
from spectune.studio.rendering import render
from spectune.studio.workspace import Workspace

router = APIRouter()

Values = dict[str, Any]  # the sections of a recipe

LONGEST_TEXT = 500_000
MOST_RECIPES = 200  # in the list
# What a preset names for its own pictures and model: the user chooses these.
OWN_OF_PRESETS = (
    ("model", "base"), ("model", "residual"), ("model", "principal"), ("model", "start"), ("vae", "path"),
    ("data", "folders"), ("data", "sets"), ("data", "regularisation_folders"), ("data", "validation_folder"),
    ("data", "cache_folder"), ("run", "name"), ("run", "output"), ("run", "preview"),
)  # fmt: skip


class OpenRequest(BaseModel):
    """What the form shows next. Exactly one field is set."""

    path: str | None = Field(default=None, max_length=4096)
    preset: str | None = Field(default=None, max_length=100)
    text: str | None = Field(default=None, max_length=LONGEST_TEXT)
    command: str | None = Field(default=None, max_length=LONGEST_TEXT)


class ValuesRequest(BaseModel):
    """The values of the form."""

    values: Values
    quick: bool = False  # check the keys only, not the files that they name
    force: bool = False


class SaveRequest(BaseModel):
    """The values of the form and a name for the file."""

    values: Values
    name: str = Field(max_length=200)
    overwrite: bool = False


@router.get("/recipe")
def page(request: Request) -> Response:
    return render(request, "recipe.html", title="Recipe")


@router.get("/api/recipe/schema")
def schema(space: Space) -> dict[str, Any]:
    return space.ask("recipe_schema", {})


@router.get("/api/recipe/files")
def files(space: Space) -> dict[str, Any]:
    """Return the presets, and the recipes in the folders, the newest first."""
    places = space.places()
    found = finding.files_ending_in(".toml", (places.output, *places.data))
    return {
        "presets": [{"name": path.stem, "about": _about(path)} for path in _presets()],
        "recipes": [str(path) for path in found[:MOST_RECIPES]],
    }


@router.post("/api/recipe/open")
def open_recipe(space: Space, source: OpenRequest) -> dict[str, Any]:
    """Return the values and the text of a recipe, and the verdict for each flag of a command."""
    notes: dict[str, Any] = {}
    folder = str(space.output)
    if source.command is not None:
        notes = space.ask("recipe_import", {"command": source.command, "folder": folder})
        if notes["values"] is None:
            raise InputError(
                "this command trains nothing: it only rewrites a LoRA", hint="use the tool split"
            )
        values = notes["values"]
    elif source.preset is not None:
        values = _without_files(
            space.ask("recipe_values", {"text": _preset(source.preset), "folder": folder})
        )
    elif source.path is not None:
        path = space.places().file(source.path)
        values = space.ask("recipe_values", {"path": str(path)})["values"]
    else:
        values = space.ask("recipe_values", {"text": source.text or "", "folder": folder})["values"]
    text = source.text
    if text is None:
        text = space.ask("recipe_text", {"values": values})["text"]
    return {"values": values, "text": text, "flags": notes.get("flags", []), "notes": notes.get("notes", [])}


@router.post("/api/recipe/text")
def text_of(space: Space, form: ValuesRequest) -> dict[str, Any]:
    return space.ask("recipe_text", {"values": form.values}, topic="recipe.text")


@router.post("/api/recipe/check")
def check(space: Space, form: ValuesRequest) -> dict[str, Any]:
    """Check the keys, or everything that `train --dry-run` checks."""
    values = {"values": form.values, "folder": str(space.output), "quick": form.quick, "force": form.force}
    return space.ask("check", values, topic="recipe.check")


@router.post("/api/recipe/save")
def save(space: Space, form: SaveRequest) -> dict[str, Any]:
    """Write the recipe to the folder `recipes` of the output folder."""
    text = space.ask("recipe_text", {"values": form.values})["text"]
    return {"path": str(_written(space, form, text))}


def _written(space: Workspace, form: SaveRequest, text: str) -> Path:
    folder = space.output / "recipes"
    path = space.places().inside(str(folder / f"{plain_name(form.name.strip())}.toml"))
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists() and not form.overwrite:
        raise InputError(f"{path.name} exists", hint="choose another name, or tick Overwrite")
    replace_text(path, text)
    return path


def _presets() -> list[Path]:
    """Return the example recipes: in the package, or in the repository that it was installed from."""
    package = Path(__file__).parents[2]
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if folder.is_dir():
            return sorted(folder.glob("*.toml"))
    return []


def _preset(name: str) -> str:
    for path in _presets():
        if path.stem == name:
            return path.read_text(encoding="utf-8")
    raise InputError(f"there is no preset {name!r}")


def _about(path: Path) -> str:
    """Return the comment at the top of a recipe, without the line with its command."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "spectune train" not in line and "accelerate launch" not in line:
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def _without_files(answer: dict[str, Any]) -> Values:
    values = copy.deepcopy(answer["values"])
    for section, key in OWN_OF_PRESETS:
        values.get(section, {}).pop(key, None)
    return values
