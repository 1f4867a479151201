"""A run: curves, previews, and its controls."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from spectune.studio.rendering import render

router = APIRouter()


@router.get("/runs/{job}")
def page(request: Request, job: str) -> Response:
    return render(request, "run.html", title="Run", job=job)
