"""Set up a training: from a checkpoint and a folder of pictures to a checked recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from spectune.errors import InputError
from spectune.files.rename import replace_text
from spectune.studio import finding, runs
from spectune.studio.pages import Space
from spectune.studio.places import Refused, plain_name
from spectune.studio.rendering import render
from spectune.studio.workspace import Workspace
from spectune.training.data.names import name_of

router = APIRouter()

SMALL_BYTES = 100_000_000  # a checkpoint whose energy is measured at once
PROBLEMS_SHOWN, ITEMS_SHOWN = 12, 5


class TuneRequest(BaseModel):
    """The fields of the page."""

    model: str = Field(max_length=4096)
    folder: str = Field(max_length=4096)
    name: str = Field(default="", max_length=100)
    rank: int | None = Field(default=None, ge=1, le=1024)
    steps: int | None = Field(default=None, ge=1, le=1_000_000)
    prediction: str | None = Field(default=None, max_length=10)
    prompts: list[str] | None = Field(default=None, max_length=64)  # None: captions of the pictures


@router.get("/new")
def page(request: Request) -> Response:
    return render(request, "new_tune.html", title="New tune")


@router.get("/api/new/choices")
def choices(space: Space) -> dict[str, Any]:
    """Return what can be chosen: checkpoints and folders of pictures, the newest first."""
    places = space.places()
    output = places.output.resolve()
    folders = [
        one
        for one in finding.picture_folders(places.data)
        if not Path(one["path"]).resolve().is_relative_to(output)
    ]
    return {
        "checkpoints": finding.checkpoints(places.models),
        "folders": folders,
        "model_folders": [str(folder) for folder in places.models],
        "data_folders": [str(folder) for folder in places.data],
        "output": str(places.output),
        "remote": space.remote,
    }


@router.get("/api/new/checkpoint")
def checkpoint(space: Space, path: str) -> dict[str, Any]:
    """Return what a checkpoint is, and the costs of its ranks."""
    model = str(space.places().inside(path))
    summary = space.ask("inspect", {"model": model}, topic="new.checkpoint")
    if "parts" not in summary or summary.get("role") != "model":
        raise InputError(
            f"{Path(path).name} is not a whole checkpoint: it is a file of the kind {summary.get('role')}",
            hint="choose the checkpoint that you want to change",
        )
    nbytes = sum(part["nbytes"] for part in summary["parts"])
    return {
        "label": summary["label"],
        "prediction": summary["prediction"],
        "declared": summary["declared"],
        "nbytes": nbytes,
        "parts": [part["name"] for part in summary["parts"] if part["tensors"] and part["name"] != "other"],
        "ranks": summary["ranks"],
        "small": nbytes < SMALL_BYTES,
    }


@router.get("/api/new/energy")
def energy(space: Space, path: str) -> dict[str, Any]:
    """Return the measured energy of the ranks. Measuring a whole SDXL takes minutes: that is a job."""
    model = space.places().file(path)
    if model.stat().st_size >= SMALL_BYTES:
        raise InputError("measuring this checkpoint takes minutes", hint="press Measure")
    report = space.ask("inspect", {"model": str(model), "spectrum": True}, topic="new.energy")
    return {"energies": report["total"]["energies"]}


@router.get("/api/new/speed")
def speed(space: Space, path: str) -> dict[str, Any]:
    """Return the time per picture of the newest training of a checkpoint, None if there was none."""
    model = space.places().inside(path)
    return {"seconds_per_picture": runs.seconds_per_picture(space.home / "jobs", model)}


@router.get("/api/new/pictures")
def pictures(space: Space, path: str, resolution: int = 1024) -> dict[str, Any]:
    """Return the number of pictures and captions in a folder, and possible mistakes at a resolution."""
    folder = space.places().folder(path)
    values = {"folders": [str(folder)], "resolution_px": resolution}
    report = space.ask("dataset", values, topic="new.pictures")
    problems = [
        {"text": one["text"], "items": one["items"][:ITEMS_SHOWN], "more": len(one["items"]) - ITEMS_SHOWN}
        for one in report["problems"][:PROBLEMS_SHOWN]
    ]
    return {
        "pictures": len(report["pictures"]),
        "captioned": report["captioned"],
        "problems": problems,
        "samples": [one["path"] for one in report["pictures"][:8]],
        "name": finding.free_name(name_of(folder), space.output),
    }


@router.post("/api/new/check")
def check(space: Space, wanted: TuneRequest) -> dict[str, Any]:
    """Return the recipe as it would be written, and what `train --dry-run` says about it."""
    return _checked(space, wanted, topic="new.check")


@router.post("/api/new/write")
def write(space: Space, wanted: TuneRequest) -> dict[str, Any]:
    """Write the recipe and its prompts, if the check finds no problem. Existing files stay."""
    draft = _checked(space, wanted, topic=None)
    if draft["problems"]:
        first = draft["problems"][0]
        raise InputError(first["what"], hint=first["hint"])
    recipe, prompts = Path(draft["path"]), Path(draft["prompts_path"])
    recipe.parent.mkdir(parents=True, exist_ok=True)
    for path in (recipe, prompts):
        if path.exists():
            raise Refused(f"{path.name} exists already", hint="choose another name for the tune")
    if draft["prompts"]:
        replace_text(prompts, "".join(f"{line}\n" for line in _seeded(draft["prompts"])))
    replace_text(recipe, draft["text"])
    return {"path": str(recipe), "name": draft["name"]}


def _checked(space: Workspace, wanted: TuneRequest, *, topic: str | None) -> dict[str, Any]:
    places = space.places()
    folder = places.folder(wanted.folder)
    name = plain_name(wanted.name or finding.free_name(name_of(folder), places.output))
    if finding.is_taken(name, places.output):
        raise InputError(f"there is a tune named {name} already", hint="choose another name")
    out = places.inside(str(places.output / f"{name}.toml"))
    values = {
        "model": str(places.inside(wanted.model)), "folder": str(folder), "out": str(out), "name": name,
        "rank": wanted.rank, "steps": wanted.steps, "prediction": wanted.prediction or None, "yes": True,
    }  # fmt: skip
    draft = space.ask("new", values, topic=topic)
    prompts = draft["prompts"] if wanted.prompts is None else _plain_prompts(wanted.prompts)
    sections, text = _with_prompts(space, draft, prompts)
    # The file of the prompts is written with the recipe, so it is not checked here.
    run = {key: value for key, value in sections["run"].items() if key != "preview"}
    question = {"values": {**sections, "run": run}, "folder": str(out.parent)}
    found = space.ask("check", question, topic=topic)
    return {
        "name": name,
        "path": str(out),
        "text": text,
        "prompts": prompts,
        "prompts_path": draft["prompts_path"],
        "pictures": draft["pictures"],
        "steps": draft["steps"],
        "rank": sections["model"].get("rank"),
        "resolution": sections["data"].get("resolution_px", 1024),
        "notes": draft["notes"],
        "warnings": draft["warnings"],
        "problems": found["problems"],
        "forecast": _shown(found["forecast"]),
    }


def _with_prompts(
    space: Workspace, draft: Mapping[str, Any], prompts: list[str]
) -> tuple[dict[str, Any], str]:
    """Return the sections and the text of a draft; the recipe names the file of prompts if there are any."""
    sections = draft["values"]
    if bool(prompts) == ("preview" in sections["run"]):
        return sections, draft["text"]
    run = {key: value for key, value in sections["run"].items() if key != "preview"}
    if prompts:
        run["preview"] = draft["prompts_path"]
    sections = {**sections, "run": run}
    return sections, space.ask("recipe_text", {"values": sections})["text"]


def _plain_prompts(lines: list[str]) -> list[str]:
    kept = [line.strip() for line in lines if line.strip()]
    for number, line in enumerate(kept, start=1):
        if not line.isprintable() or line.startswith(("#", "//")) or len(line) > 2000:
            raise InputError(
                f"the preview prompt {number} begins with # or //, or contains characters that cannot be "
                "printed",
                hint="write one prompt per line, in plain text",
            )
    return kept


def _seeded(prompts: list[str]) -> list[str]:
    """Return the lines of a file of prompts: each prompt keeps its seed, so that steps can be compared."""
    return [line if " --" in line else f"{line} --d {seed}" for seed, line in enumerate(prompts, start=1)]


def _shown(forecast: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what the page shows of a forecast."""
    if forecast is None:
        return None
    names = ("base", "device", "pictures", "schedule", "memory", "saves", "disk", "warnings", "chosen")
    return {name: forecast[name] for name in names}
