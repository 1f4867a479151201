"""Recipe: every key of a recipe as a form."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from spectune.studio.rendering import render

router = APIRouter()


@router.get("/recipe")
def page(request: Request) -> Response:
    return render(request, "recipe.html", title="Recipe")
