"""Settings: folders and theme."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from spectune.studio.rendering import render

router = APIRouter()


@router.get("/settings")
def page(request: Request) -> Response:
    return render(request, "settings.html", title="Settings")
