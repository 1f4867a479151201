"""Tools: the commands as forms."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from spectune.studio.rendering import render

router = APIRouter()


@router.get("/tools")
def page(request: Request) -> Response:
    return render(request, "tools.html", title="Tools")
