"""What the files of a training tell, without torch: its recipe, its results, its speed."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from spectune.cli.job import EVENTS
from spectune.errors import InputError, printable
from spectune.files.text import load_toml
from spectune.studio.jobs.reading import read_events
from spectune.studio.jobs.records import JobRecord
from spectune.studio.places import Refused
from spectune.studio.workspace import Workspace

TAIL_BYTES = 64_000  # of an event file, for the newest steps
LARGEST_RECIPE = 1_000_000
JOBS_READ = 30  # for the speed
_PARTS = {"unet": "unet", "te1": "te", "te2": "te"}


@dataclass(frozen=True)
class TrainingFiles:
    """A training: its recipe, and the paths of its files."""

    recipe: Path
    name: str
    base: Path
    output: Path
    batch: int
    resolution_px: int
    prompts: Path | None
    parts: tuple[str, ...]  # of the model that are trained: unet, te

    @property
    def tuned(self) -> Path:
        """Return the adapter of the last step."""
        return self.output / f"{self.name}.safetensors"

    @property
    def saves(self) -> list[tuple[int, Path]]:
        """Return the adapters that were saved on the way, with their steps."""
        pattern = re.compile(re.escape(self.name) + r"-step(\d{8})\.safetensors")
        found = (
            (pattern.fullmatch(path.name), path) for path in self.output.glob(f"{_escaped(self.name)}-step*")
        )
        return sorted((int(match[1]), path) for match, path in found if match)

    @property
    def previews(self) -> list[tuple[int, list[Path]]]:
        """Return the pictures of each preview, with its step."""
        folders = (self.output / "previews").glob(f"{_escaped(self.name)}-step*/")
        found = ((folder, folder.name.removeprefix(f"{self.name}-step")) for folder in folders)
        return sorted((int(step), sorted(folder.glob("*.png"))) for folder, step in found if step.isdecimal())


def training_files(recipe: Path) -> TrainingFiles:
    """Return the files of the training of a recipe.

    Raises:
        InputError: The recipe cannot be read, or lacks the keys that name its files.
    """
    try:
        if recipe.stat().st_size > LARGEST_RECIPE:
            raise ValueError("the file is too large")
        data = load_toml(recipe.read_text(encoding="utf-8-sig"))
        run, model = data["run"], data["model"]
        folder = recipe.parent
        preview = run.get("preview")
        return TrainingFiles(
            recipe=recipe,
            name=str(run["name"]),
            base=_below(folder, model["base"]),
            output=_below(folder, run["output"]),
            batch=int(run.get("batch", 1)),
            resolution_px=int(data.get("data", {}).get("resolution_px", 1024)),
            prompts=None if preview is None else _below(folder, preview),
            parts=tuple(dict.fromkeys(_PARTS[part] for part in model.get("parts", _PARTS))),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"the files of the training cannot be found with its recipe {recipe.name}: {error}",
            hint="use the page Tools with the files themselves",
        ) from error


def files_of_job(space: Workspace, job: str) -> TrainingFiles:
    """Return the files of the training of a job; its folders are those of the Studio.

    Raises:
        Refused: There is no such job, it does not train, or its files are outside of the folders.
        InputError: Its recipe cannot be read.
    """
    recipe = recipe_path(space.jobs.job(job).record)
    if recipe is None:
        raise Refused(f"the job {printable(job, 60)} is not a training")
    places = space.places()
    files = training_files(places.file(str(recipe)))
    for path in (files.base, files.output):
        places.inside(str(path))
    return files


def recipe_path(job: JobRecord) -> Path | None:
    """Return the recipe of a job that trains, otherwise None."""
    return Path(job.cwd) / str(job.values["recipe"]) if job.command == "train" else None


def read_prompts(path: Path | None) -> list[str]:
    """Return the prompts of a file without their options, or [] if there are none."""
    if path is None or not path.is_file() or path.stat().st_size > LARGEST_RECIPE:
        return []
    lines = (line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [line.split(" --")[0].strip() for line in lines if line and not line.startswith(("#", "//"))]


def seconds_per_picture(jobs: Path, base: Path) -> float | None:
    """Return the time per picture of the newest training of a checkpoint, or None if there is none."""
    records = sorted(jobs.glob(f"*/{JobRecord.FILE}"), key=lambda path: -path.stat().st_mtime)
    found = (_seconds_per_picture(file, base) for file in records[:JOBS_READ])
    return next((seconds for seconds in found if seconds is not None), None)


def _seconds_per_picture(file: Path, base: Path) -> float | None:
    job = JobRecord.read(file)
    recipe = None if job is None else recipe_path(job)
    if recipe is None:
        return None
    try:
        files = training_files(recipe)
    except InputError:  # its recipe was removed
        return None
    events = file.with_name(EVENTS)
    size = events.stat().st_size if events.exists() else 0
    newest, _ = read_events(events, max(0, size - TAIL_BYTES))
    seconds = [event["seconds"] for event in newest if event.get("event") == "step"]
    if not seconds or files.base.resolve() != base.resolve():
        return None
    return median(seconds) / files.batch


def _below(folder: Path, text: Any) -> Path:
    """Return a path of a recipe, without `..`; a relative one starts at the recipe's folder."""
    return Path(os.path.normpath(folder / str(text)))


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)
