"""Pictures of the user's folders, small and whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

from spectune.files.rename import replacing
from spectune.studio.pages import Space
from spectune.studio.places import Refused
from spectune.studio.workspace import Workspace

router = APIRouter()

SIZES_PX = (144, 256, 512)
WHOLE = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
# A file that changes has another address of its thumbnail only after this time.
HEADERS = {"cache-control": "private, max-age=60"}


@router.get("/api/thumbnail")
def thumbnail(space: Space, path: str, size: int = 256) -> FileResponse:
    """Return a picture, made smaller to fit into a square of `size` pixels: 144, 256 or 512."""
    if size not in SIZES_PX:
        raise Refused(f"there are no thumbnails of {size} pixels")
    made = _made(space, space.places().file(path), size)
    return FileResponse(made, media_type="image/jpeg", headers=HEADERS)


@router.get("/api/picture")
def picture(space: Space, path: str) -> FileResponse:
    """Return a picture file as it is."""
    file = space.places().file(path)
    kind = WHOLE.get(file.suffix.lower())
    if kind is None:
        return FileResponse(_made(space, file, SIZES_PX[-1]), media_type="image/jpeg", headers=HEADERS)
    return FileResponse(file, media_type=kind, headers=HEADERS)


def _made(space: Workspace, file: Path, size: int) -> Path:
    """Return the file of a thumbnail; make it if it is missing or the picture is newer."""
    status = file.stat()
    key = f"{file}\n{status.st_mtime_ns}\n{status.st_size}\n{size}".encode("utf-8", "surrogatepass")
    target = space.home / "thumbnails" / f"{hashlib.sha256(key).hexdigest()[:32]}.jpg"
    if not target.exists():
        _make(file, target, size)
    return target


def _make(file: Path, target: Path, size: int) -> None:
    from PIL import ImageOps  # not at the top: most pages show no picture

    from spectune.training.data.pictures.formats import open_picture

    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open_picture(file) as opened:
            opened.draft("RGB", (size, size))
            small = ImageOps.exif_transpose(opened)
            small.thumbnail((size, size))
            with replacing(target) as partial:
                small.convert("RGB").save(partial, format="JPEG", quality=85)
    except Exception as error:  # whatever Pillow raises for a damaged file
        raise Refused(f"{file.name} cannot be shown as a picture") from error
