"""A run: curves, previews, and its controls. Everything that changes comes with the events of the job.

Jobs that do not train have this page too, without curves and previews.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from spectune.studio import runs
from spectune.studio.pages import Space
from spectune.studio.rendering import render

router = APIRouter()


@router.get("/runs/{job}")
def page(request: Request, space: Space, job: str) -> Response:
    record = space.jobs.job(job).record
    return render(
        request,
        "run.html",
        title=record.title or "Run",
        job=job,
        trains=runs.recipe_path(record) is not None,
        outputs=record.outputs,
    )


@router.get("/api/runs/{job}/files")
def files(space: Space, job: str) -> dict[str, Any]:
    """Return the files of a training."""
    found = runs.files_of_job(space, job)
    return {
        "name": found.name,
        "recipe": str(found.recipe),
        "base": str(found.base),
        "output": str(found.output),
        "tuned": str(found.tuned) if found.tuned.exists() else None,
    }


@router.get("/api/runs/card")
def card(space: Space) -> dict[str, Any]:
    """Return the graphics card and its memory."""
    return space.ask("device", {})
