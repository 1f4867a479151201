"""The first page: the current job, recent runs, and a way to a new one. Its script asks /api/jobs."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from spectune.studio.pages import Space
from spectune.studio.rendering import render

router = APIRouter()


@router.get("/")
def page(request: Request, space: Space) -> Response:
    places = space.places()
    missing = [
        word for word, folders in (("models", places.models), ("pictures", places.data)) if not folders
    ]
    return render(request, "home.html", title="Home", missing=missing)
