"""The commands on files as forms. Each runs as a job, and the page shows its progress and its result."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from spectune.studio import finding
from spectune.studio.forms import TOOLS, tool_of
from spectune.studio.pages import Space
from spectune.studio.places import Refused
from spectune.studio.rendering import render

router = APIRouter()

MOST_FILES = 1000


@router.get("/tools")
def index(request: Request, space: Space) -> Response:
    tools = [tool_of(name, space.output) for name in TOOLS]
    return render(request, "tools.html", title="Tools", tools=tools)


@router.get("/tools/{name}")
def page(request: Request, space: Space, name: str) -> Response:
    """Show the form of a command. Query parameters fill its fields."""
    if name not in TOOLS:
        raise Refused(f"there is no tool {name!r}")
    given = dict(request.query_params)
    return render(request, "tool.html", title=name, tool=tool_of(name, space.output), given=given)


@router.get("/api/tools/files")
def files(space: Space) -> dict[str, Any]:
    """Return the weight files in the folders, the newest first."""
    found = finding.files_ending_in(".safetensors", space.places().roots)
    return {"files": [str(path) for path in found[:MOST_FILES]]}
