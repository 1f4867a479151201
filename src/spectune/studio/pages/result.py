"""A result: comparison with the base, and what to build."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from spectune.studio.rendering import render

router = APIRouter()


@router.get("/results/{job}")
def page(request: Request, job: str) -> Response:
    return render(request, "result.html", title="Result", job=job)
