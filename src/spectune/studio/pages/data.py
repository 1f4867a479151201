"""Pictures and captions: look, filter, edit, find and replace, add files."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, UploadFile
from fastapi.responses import Response
from pydantic import BaseModel, Field

from spectune.errors import InputError, printable
from spectune.files.rename import replacing
from spectune.studio import finding
from spectune.studio.captions import EXTENSIONS, LARGEST_CHARACTERS, read_caption, write_caption
from spectune.studio.forms import free_path
from spectune.studio.pages import Space
from spectune.studio.places import plain_name
from spectune.studio.rendering import render
from spectune.studio.workspace import Workspace

router = APIRouter()

Row = dict[str, Any]  # of assistant/picture_questions.py

MOST_ROWS = 400  # of one reply
LONG_TOKENS, ENLARGED, CROPPED = 225, 1.5, 0.05  # as in ops/dataset/problems.py and the default of captions
FILTERS: dict[str, Callable[[Row], bool]] = {
    "all": lambda row: True,
    "no_caption": lambda row: not row["captioned"],
    "long": lambda row: row["tokens"] > LONG_TOKENS,
    "small": lambda row: row.get("enlarged", 0) > ENLARGED,
    "cropped": lambda row: row.get("cropped", 0) > CROPPED,
    "duplicate": lambda row: row["duplicate"],
    "unreadable": lambda row: row["problem"] is not None,
}


@dataclass
class Opened:
    """The folder that is open. One at a time is kept, so that the server stays small."""

    folder: Path | None = None
    rows: dict[str, Row] = field(default_factory=dict)  # by path
    lock: Lock = field(default_factory=Lock)


OPENED = Opened()


class Shown(BaseModel):
    """Which pictures are shown."""

    folder: str = Field(max_length=4096)
    filter: Literal["all", "no_caption", "long", "small", "cropped", "duplicate", "unreadable"] = "all"
    search: str = Field(default="", max_length=200)


class CaptionChange(BaseModel):
    """A new caption of a picture."""

    path: str = Field(max_length=4096)
    text: str | None = Field(max_length=LARGEST_CHARACTERS)  # None: remove the file


class Changes(BaseModel):
    """New captions of many pictures: an undo."""

    changes: Annotated[list[CaptionChange], Field(max_length=100_000)]


class CaptionReplacement(Shown):
    """Replace a text in the captions of the pictures that are shown."""

    find: str = Field(min_length=1, max_length=1000)
    replace: str = Field(max_length=1000)
    apply: bool = False  # False: only count


@router.get("/data")
def page(request: Request) -> Response:
    return render(request, "data.html", title="Pictures")


@router.get("/api/data/folders")
def folders(space: Space) -> dict[str, Any]:
    return {
        "folders": finding.picture_folders(space.places().data),
        "roots": list(map(str, space.places().data)),
    }


@router.get("/api/data/open")
def open_folder(space: Space, folder: str, refresh: bool = False) -> dict[str, Any]:
    """Read a folder, and return what is in it."""
    rows = _rows(space, space.places().folder(folder), refresh=refresh)
    readable = [row for row in rows if row["problem"] is None]
    sizes = Counter("x".join(map(str, row["bucket"])) for row in readable)
    return {
        "count": len(rows),
        "draws": sum(row["repeats"] for row in readable),
        "captioned": sum(row["captioned"] for row in rows),
        "cropped": sum(row["cropped"] for row in readable) / max(len(readable), 1),
        "buckets": [{"label": label, "value": value} for label, value in sizes.most_common(40)],
        "filters": {name: sum(map(test, rows)) for name, test in FILTERS.items()},
    }


@router.get("/api/data/rows")
def rows_of(
    space: Space,
    folder: str,
    filter: Literal["all", "no_caption", "long", "small", "cropped", "duplicate", "unreadable"] = "all",
    search: str = "",
    start: int = 0,
    count: int = 100,
) -> dict[str, Any]:
    """Return some of the pictures that pass a filter and contain the text `search`."""
    found = _shown(space, Shown(folder=folder, filter=filter, search=search))
    return {"total": len(found), "rows": found[max(start, 0) :][: min(max(count, 0), MOST_ROWS)]}


@router.post("/api/data/caption")
def set_caption(space: Space, change: CaptionChange) -> dict[str, Any]:
    """Write one caption; return the text that it replaced, for undo, and its tokens."""
    before = _apply(space, change)
    tokens = space.ask("caption_tokens", {"texts": [change.text or ""]})["tokens"][0]
    row = OPENED.rows.get(change.path)
    if row is not None:
        row["tokens"] = tokens
    return {"before": before, "tokens": tokens}


@router.post("/api/data/captions")
def set_captions(space: Space, undo: Changes) -> dict[str, Any]:
    """Write many captions: the undo of a replacement."""
    for change in undo.changes:
        _apply(space, change)
    _count_tokens(space, [change.path for change in undo.changes])
    return {"changed": len(undo.changes)}


@router.post("/api/data/replace")
def replace(space: Space, wanted: CaptionReplacement) -> dict[str, Any]:
    """Replace a text in the captions that are shown, or count the pictures that contain it."""
    found = [row for row in _shown(space, wanted) if wanted.find in row["text"]]
    if not wanted.apply:
        return {"pictures": len(found), "changes": []}
    before = [{"path": row["path"], "text": read_caption(Path(row["path"]))} for row in found]
    for row in found:
        text = row["text"].replace(wanted.find, wanted.replace)
        _apply(space, CaptionChange(path=row["path"], text=text))
    _count_tokens(space, [row["path"] for row in found])
    return {"pictures": len(found), "changes": before}


@router.post("/api/uploads/data")
def add_files(space: Space, folder: str, files: list[UploadFile]) -> dict[str, Any]:
    """Add pictures and caption files to a folder. A name that is taken gets a number."""
    target = space.places().folder(folder)
    added: list[str] = []
    for upload in files:
        name = plain_name((upload.filename or "").replace("\\", "/").rpartition("/")[2])
        if not _is_picture(Path(name)) and Path(name).suffix.lower() not in EXTENSIONS:
            raise InputError(
                f"{printable(name)} is neither a picture nor a caption",
                hint="expected a picture such as .png or .jpg, or a caption in .txt or .caption",
            )
        path = free_path(space.places().inside(str(target / name)))
        with replacing(path) as partial, partial.open("wb") as file:
            shutil.copyfileobj(upload.file, file)
        added.append(path.name)
    OPENED.folder = None
    return {"added": added}


def _rows(space: Workspace, folder: Path, *, refresh: bool = False) -> list[Row]:
    with OPENED.lock:
        if refresh or OPENED.folder != folder:
            rows = space.ask("pictures", {"folder": str(folder)})["rows"]
            OPENED.rows = {row["path"]: row for row in rows}
            OPENED.folder = folder
        return list(OPENED.rows.values())


def _shown(space: Workspace, wanted: Shown) -> list[Row]:
    rows = _rows(space, space.places().folder(wanted.folder))
    test, words = FILTERS[wanted.filter], wanted.search.lower()
    return [
        row for row in rows if test(row) and (words in row["text"].lower() or words in row["name"].lower())
    ]


def _apply(space: Workspace, change: CaptionChange) -> str | None:
    """Write a caption and return the text of the file before, None if there was none."""
    picture = space.places().file(change.path)
    if not _is_picture(picture):
        raise InputError(f"{picture.name} is not a picture")
    before = read_caption(picture)
    write_caption(picture, change.text)
    row = OPENED.rows.get(change.path)
    if row is not None:
        row["text"] = change.text or ""
        row["captioned"] = bool((change.text or "").strip())
    return before


def _is_picture(path: Path) -> bool:
    from spectune.training.data.pictures.formats import is_picture  # imports PIL

    return is_picture(path)


def _count_tokens(space: Workspace, paths: Sequence[str]) -> None:
    rows = [row for path in paths if (row := OPENED.rows.get(path)) is not None]
    counts = space.ask("caption_tokens", {"texts": [row["text"] for row in rows]})["tokens"]
    for row, tokens in zip(rows, counts, strict=True):
        row["tokens"] = tokens
