"""A result: compare it with the base, choose strengths and saves, build files, check them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from spectune.errors import InputError
from spectune.studio import runs
from spectune.studio.pages import Space
from spectune.studio.rendering import render
from spectune.studio.runs import TrainingFiles

router = APIRouter()

PROMPTS = 4  # of a comparison
CELL_PX = 512
ENDINGS = {"checkpoint": "-checkpoint.safetensors", "lora": "-lora.safetensors", "compare": "-compare.png"}


class PartChoice(BaseModel):
    """One part of the tuned model: the step of its save, and how much of its change is used."""

    step: int | None = Field(default=None, ge=1)  # None: the last step
    strength: float = Field(default=1.0, ge=-2.0, le=3.0)


class BuildRequest(BaseModel):
    """What to make, and of which parts."""

    kind: Literal["checkpoint", "lora", "compare"]
    parts: dict[Literal["unet", "te"], PartChoice]
    prompts: list[str] = Field(default=[], max_length=16)


@router.get("/results/{job}")
def page(request: Request, space: Space, job: str) -> Response:
    return render(request, "result.html", title=space.jobs.job(job).record.title or "Result", job=job)


@router.get("/api/results/{job}/files")
def files(space: Space, job: str) -> dict[str, Any]:
    """Return the files of a training and what was built of them."""
    found = runs.files_of_job(space, job)
    sheets = _made(found, "compare")
    built = [
        {"kind": kind, "path": str(path), "nbytes": path.stat().st_size}
        for kind in ("checkpoint", "lora")
        for path in _made(found, kind)
    ]
    return {
        "name": found.name,
        "base": str(found.base),
        "output": str(found.output),
        "tuned": str(found.tuned) if found.tuned.exists() else None,
        "saves": [{"step": step, "path": str(path)} for step, path in found.saves],
        "previews": [
            {"step": step, "files": [str(path) for path in pictures]} for step, pictures in found.previews
        ],
        "parts": found.parts,
        "prompts": runs.read_prompts(found.prompts)[:PROMPTS],
        "built": built,
        "compare": str(max(sheets, key=lambda path: path.stat().st_mtime)) if sheets else None,
    }


@router.post("/api/results/{job}/plan")
def plan(space: Space, job: str, wanted: BuildRequest) -> dict[str, Any]:
    """Return the jobs that make a file, in their order. A file newer than the result is not made again.

    The reply is `{"target", "jobs": [{"command", "values"}]}`.
    """
    found = runs.files_of_job(space, job)
    adapter, jobs = _adapter(found, wanted.parts)
    target = adapter.with_name(adapter.stem + ENDINGS[wanted.kind])
    newest = max((path.stat().st_mtime for path in (found.tuned, adapter) if path.exists()), default=0.0)
    if wanted.kind != "compare" and not jobs and target.exists() and target.stat().st_mtime >= newest:
        return {"target": str(target), "jobs": []}
    values: dict[str, Any] = {"out": str(target), "force": target.exists()}
    base = str(found.base)
    if wanted.kind == "checkpoint":
        jobs.append(_job("rebuild", base=base, adapter=str(adapter), **values))
    elif wanted.kind == "lora":
        jobs.append(_job("export", tuned=str(adapter), base=base, **values))
    else:
        jobs.append(_job("compare", **_comparison(found, adapter, wanted.prompts), **values))
    return {"target": str(target), "jobs": jobs}


@router.get("/api/results/verify")
def verify(space: Space, path: str) -> dict[str, Any]:
    """Read a built file and return what it is and what other programs load of it."""
    summary = space.ask("inspect", {"model": str(space.places().file(path))}, topic="result.verify")
    return {
        "label": summary["label"],
        "role": summary["role"],
        "prediction": summary.get("prediction"),
        "programs": summary["programs"],
        "problems": summary.get("problems", []),
    }


def _made(found: TrainingFiles, kind: str) -> list[Path]:
    """Return what was built from the result of a training: its checkpoints, LoRAs or comparisons."""
    return sorted(path for path in found.output.glob(f"*{ENDINGS[kind]}") if path.name.startswith(found.name))


def _adapter(found: TrainingFiles, parts: dict[Any, PartChoice]) -> tuple[Path, list[dict[str, Any]]]:
    """Return the adapter with the chosen parts, and the job that makes it if it does not exist.

    Its name has the choices, so that equal choices need one file: `style-te500x0.5-unet.safetensors`.
    """
    chosen = {part: parts.get(part, PartChoice()) for part in found.parts}
    if all(choice.step is None and choice.strength == 1 for choice in chosen.values()):
        if not found.tuned.exists():
            raise InputError("the training has not written its result yet", hint="choose the step of a save")
        return found.tuned, []
    if not any(choice.strength for choice in chosen.values()):
        raise InputError("all strengths are 0: nothing would change", hint="raise one of them")
    saves = dict(found.saves)
    words, slices = [], []
    for part, choice in sorted(chosen.items()):
        if not choice.strength:
            continue
        source = found.tuned if choice.step is None else saves.get(choice.step)
        if source is None or not source.exists():
            raise InputError(f"there is no save of step {choice.step}", hint="choose another step")
        weight = f"{choice.strength:g}"
        words.append(f"{part}{choice.step or ''}" + ("" if choice.strength == 1 else f"x{weight}"))
        slices.append(f"{source}:{part}:{weight}")
    out = found.output / f"{found.name}-{'-'.join(words)}.safetensors"
    if out.exists() and (not found.tuned.exists() or out.stat().st_mtime >= found.tuned.stat().st_mtime):
        return out, []
    return out, [_job("slice", slices=slices, out=str(out), base=str(found.base), force=out.exists())]


def _comparison(found: TrainingFiles, adapter: Path, prompts: list[str]) -> dict[str, Any]:
    """Return the options of `compare` for the base and the tuned model, with the same seeds."""
    captions = [text.strip() for text in prompts if text.strip()] or runs.read_prompts(found.prompts)
    if not captions:
        raise InputError("there is no prompt", hint="type one prompt per line")
    return {
        "models": [str(found.base), f"{found.base}+{adapter}"],
        "captions": captions[:PROMPTS],
        "size": str(found.resolution_px),
        "cell": min(CELL_PX, max(128, found.resolution_px)),
    }


def _job(command: str, **values: Any) -> dict[str, Any]:
    return {"command": command, "values": values}
