"""The first page: the current job, recent runs, and a way to a new one."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from spectune.studio.rendering import render

router = APIRouter()


@router.get("/")
def page(request: Request) -> Response:
    return render(request, "home.html", title="Home")
