"""New tune: checkpoint, pictures, strength, length, start."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from spectune.studio.rendering import render

router = APIRouter()


@router.get("/new")
def page(request: Request) -> Response:
    return render(request, "new_tune.html", title="New tune")
