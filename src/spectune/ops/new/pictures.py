"""The pictures of a new recipe: how they are laid out, their captions, sizes and validation folder."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spectune.errors import InputError, counted
from spectune.ops.new.answers import Answers
from spectune.sdxl.layout import Layout
from spectune.training.data.folders import scan_training, scan_validation
from spectune.training.data.tables.images import CaptionedImage
from spectune.training.recipe.defaults import is_full_size
from spectune.training.recipe.sections.data import DataSection

FULL_SIZE_PX, SMALL_SIZE_PX = 1024, 64
VALIDATION_NAMES = ("validation", "val")
_REPEATED = re.compile(r"0*[1-9]\d*_.*")  # N_name: N draws per epoch


@dataclass(frozen=True)
class FoundPictures:
    """The usable pictures of a folder, and the keys that name it in a recipe."""

    folder: Path
    is_flat: bool  # the pictures are directly in the folder
    caption: str  # of pictures without a caption, in a flat folder
    images: Sequence[CaptionedImage]
    validation: Path | None
    resolution_px: int
    warnings: tuple[str, ...]

    @property
    def captions(self) -> list[str]:
        """The captions of all pictures, in order."""
        return [image.caption or self.caption for image in self.images]


def find_pictures(folder: Path, layout: Layout, answers: Answers) -> FoundPictures:
    """Return the pictures of a folder: `N_name` folders in it, or pictures directly in it.

    Raises:
        InputError: There is no such folder, or it has no usable picture.
    """
    if not folder.is_dir():
        raise InputError(f"`folder` {folder} is not a folder", hint="pass the folder with your pictures")
    is_flat = not any(_REPEATED.fullmatch(path.name) and path.is_dir() for path in folder.iterdir())
    place: dict[str, Any] = {"sets": [{"path": folder}]} if is_flat else {"folders": [folder]}
    scan = scan_training(DataSection(**place))
    empty = len(scan.empty_caption)
    caption = ""
    if is_flat and empty:
        caption = _caption(empty, len(scan.images), answers)
    return FoundPictures(
        folder=folder,
        is_flat=is_flat,
        caption=caption,
        images=scan.images,
        validation=_validation(folder),
        resolution_px=_resolution(scan.images, is_full_size(layout)),
        # pictures without a caption get the one that was asked for
        warnings=tuple((replace(scan, empty_caption=()) if caption else scan).warnings()),
    )


def _caption(empty: int, count: int, answers: Answers) -> str:
    return answers.get(
        f"{empty} of {counted(count, 'picture')} have no caption. A caption for them, such as "
        "a photo of sks (empty: none)",
        "",
    ).strip()


def _validation(folder: Path) -> Path | None:
    """Return a folder of validation pictures in or beside the folder, if there is one."""
    inside = [folder / name for name in VALIDATION_NAMES]
    resolved = folder.resolve()
    beside = [resolved.parent / name for name in (*VALIDATION_NAMES, f"{resolved.name}_validation")]
    found = (path for path in (*inside, *beside) if path.is_dir() and path.resolve() != resolved)
    return next((path for path in found if _has_pictures(path)), None)


def _has_pictures(folder: Path) -> bool:
    try:
        return scan_validation(DataSection(folders=(folder,), validation_folder=folder)) is not None
    except InputError:  # no usable picture
        return False


def _resolution(images: Sequence[CaptionedImage], full: bool) -> int:
    """Return 1024 for SDXL. A smaller base was trained on small pictures."""
    if full:
        return FULL_SIZE_PX
    side = statistics.median(min(image.size.width, image.size.height) for image in images)
    return int(max(16, min(SMALL_SIZE_PX, side // 16 * 16)))
