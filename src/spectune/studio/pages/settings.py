"""Settings: folders and theme."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from spectune.errors import InputError, printable
from spectune.studio.folder_dialog import choose_folder
from spectune.studio.pages import Space
from spectune.studio.places import LONGEST_PATH, Refused, plain_path
from spectune.studio.rendering import render
from spectune.studio.workspace import Workspace

router = APIRouter()
MOST_FOLDERS = 100
KINDS = {"models": "model folder", "data": "picture folder", "output": "output folder"}


class SettingsChange(BaseModel):
    """What a page may change; keys that are left out stay."""

    model_config = ConfigDict(extra="forbid")

    models: list[str] | None = Field(default=None, max_length=MOST_FOLDERS)
    data: list[str] | None = Field(default=None, max_length=MOST_FOLDERS)
    output: str | None = Field(default=None, max_length=LONGEST_PATH)
    theme: Literal["auto", "light", "dark"] | None = None


class FolderKind(BaseModel):
    """The kind of folder that a dialog is about."""

    kind: Literal["models", "data", "output"]


@router.get("/settings")
def page(request: Request, space: Space) -> Response:
    return render(request, "settings.html", title="Settings", settings=_shown(space))


@router.get("/api/settings")
def settings(space: Space) -> dict[str, Any]:
    return _shown(space)


@router.post("/api/settings")
def change(space: Space, wanted: SettingsChange) -> dict[str, Any]:
    """Change settings. Folders must exist; the output folder is created."""
    values: dict[str, Any] = wanted.model_dump(exclude_none=True)
    folders = [name for name in KINDS if name in values]
    _check_local(space, folders)
    for name in folders:
        if name == "output":
            values[name] = _output_folder(values[name])
        else:
            values[name] = tuple(dict.fromkeys(_folder(text, name) for text in values[name]))
    space.settings.change(**values)
    return _shown(space)


@router.post("/api/settings/browse")
def browse(space: Space, wanted: FolderKind) -> dict[str, str]:
    """Show the dialog of the system and return the folder that the user chose; it adds nothing."""
    _check_local(space, [wanted.kind])
    return {"folder": choose_folder(f"spectune: choose a {KINDS[wanted.kind]}")}


def _check_local(space: Workspace, folders: list[str]) -> None:
    if folders and space.remote:
        raise Refused(
            "folders cannot be changed from other computers",
            hint="pass --models and --data when the Studio starts",
        )


def _folder(text: str, kind: str) -> Path:
    path = Path(plain_path(text.strip().strip('"')))
    if not os.path.isdir(path):  # noqa: PTH112  # Path.is_dir raises without permission
        raise InputError(f"{printable(text)} is not a folder", hint=f"paste the full path of a {KINDS[kind]}")
    return path


def _output_folder(text: str) -> Path:
    path = Path(plain_path(text.strip().strip('"')))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{printable(text)} cannot be created: {error.strerror}") from error
    return path


def _shown(space: Workspace) -> dict[str, Any]:
    saved, places = space.settings.now, space.places()
    models, data = map(str, saved.models), map(str, saved.data)
    return {
        "models": list(models),
        "data": list(data),
        "output": str(places.output),
        "theme": saved.theme,
        # folders that cannot be removed here: of the command line, and of the configuration file
        "fixed_models": [str(path) for path in places.models if path not in saved.models],
        "fixed_data": [str(path) for path in places.data if path not in saved.data],
        "missing": [str(path) for path in (*saved.models, *saved.data) if not os.path.isdir(path)],  # noqa: PTH112
        "remote": space.remote,
        "home": str(space.home),
        "problem": space.settings.problem,
    }
