"""Pictures: the data set with its captions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from spectune.studio.rendering import render

router = APIRouter()


@router.get("/data")
def page(request: Request) -> Response:
    return render(request, "data.html", title="Pictures")
