"""The commands on files as forms. Each runs as a job, and the page shows its progress and its result."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from spectune.studio.forms import TOOLS, tool_of
from spectune.studio.pages import Space
from spectune.studio.places import Places, Refused
from spectune.studio.rendering import render

router = APIRouter()

MOST_FILES, DEEPEST = 1000, 4


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
    """Return the weight files in the folders, to choose from."""
    return {"files": sorted(_weight_files(space.places()))}


def _weight_files(places: Places) -> Iterator[str]:
    count = 0
    for root in places.roots:
        for folder, below, names in os.walk(root):
            if folder.count(os.sep) - str(root).count(os.sep) >= DEEPEST:
                below.clear()
            for name in names:
                if name.endswith(".safetensors"):
                    count += 1
                    yield os.path.join(folder, name)  # noqa: PTH118 - thousands of paths
            if count >= MOST_FILES:
                return
