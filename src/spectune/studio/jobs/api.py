"""The routes below /api/jobs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from spectune.studio.jobs.queue import JobQueue

_After = Annotated[int, Query(ge=0, le=2**53)]


class JobRequest(BaseModel):
    """A command to run."""

    command: str = Field(max_length=100)
    values: dict[str, Any] = Field(default_factory=dict)
    title: str | None = Field(default=None, max_length=200)


def router_of(jobs: JobQueue) -> APIRouter:
    """Return the routes for a queue. `after` is the `next` of the reply before; it begins with 0."""
    router = APIRouter(prefix="/api/jobs")

    @router.get("")
    def listed(limit: Annotated[int, Query(ge=1, le=10_000)] = 200) -> dict[str, Any]:
        return {"jobs": [job.as_json() for job in jobs.jobs()[:limit]]}

    @router.post("")
    def add(wanted: JobRequest) -> dict[str, Any]:
        return jobs.add(wanted.command, wanted.values, wanted.title).as_json()

    @router.get("/{id}")
    def job(id: str) -> dict[str, Any]:
        return jobs.job(id).as_json()

    @router.get("/{id}/events")
    def events(id: str, after: _After = 0) -> dict[str, Any]:
        return jobs.events(id, after)

    @router.get("/{id}/log")
    def log(id: str, after: _After = 0) -> dict[str, Any]:
        return jobs.log(id, after)

    @router.post("/{id}/kill")
    def kill(id: str) -> dict[str, Any]:
        return jobs.kill(id).as_json()

    @router.post("/{id}/resume")
    def resume(id: str) -> dict[str, Any]:
        return jobs.resume(id).as_json()

    @router.post("/{id}/remove")
    def remove(id: str) -> dict[str, Any]:
        jobs.remove(id)
        return {"removed": id}

    @router.post("/{id}/{flag}")
    def request(id: str, flag: Literal["stop", "save", "preview"]) -> dict[str, Any]:
        return jobs.request(id, flag).as_json()

    return router
