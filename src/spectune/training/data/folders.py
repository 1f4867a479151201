"""Scan the folders of a recipe: kohya's `N_name` folders, and folders of images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spectune.errors import InputError, some_of
from spectune.training.data.captions.findings import check_readable
from spectune.training.data.facts import Look
from spectune.training.data.pictures.walk import (
    folders_below,
    folders_in,
    has_pictures,
    pictures_below,
    pictures_in,
)
from spectune.training.data.scan import Scan, scan_folder
from spectune.training.data.tables.images import ImageFolder
from spectune.training.data.tables.index_file import INDEX_NAME
from spectune.training.data.tables.indexing import scan_indexed
from spectune.training.recipe.sections.data import MOST_REPEATS, DataSection, ImageSetSection

_NAME = re.compile(r"(\d+)_(.*)")
_PARENT_HINT = (
    "list in {} a folder of images, or the parent of folders named `N_name` (N = repeats); "
    "data.recursive = true includes nested folders"
)
_SET_HINT = (
    "set the path of [[data.sets]] to a folder of images; data.recursive = true includes nested folders"
)


@dataclass(frozen=True)
class Found:
    """The folders to scan below a folder of the recipe, and what is not used there."""

    folders: tuple[ImageFolder, ...]
    ignored: tuple[Path, ...] = ()  # folders
    loose: tuple[Path, ...] = ()  # images beside `N_name` folders
    below: tuple[Path, ...] = ()  # images in nested folders

    def scan(self, data: DataSection, look: Look | None = None, *, weight: float = 1.0) -> Scan:
        """Scan the folders, whose images get another weight of the loss."""
        unused = Scan((), ignored_folders=self.ignored, loose=self.loose, below=self.below)
        folders = [replace(folder, weight=folder.weight * weight) for folder in self.folders]
        return Scan.joined([unused, *(_scan(folder, data, look) for folder in folders)])


def _scan(folder: ImageFolder, data: DataSection, look: Look | None) -> Scan:
    has_index = look is None and (folder.path / INDEX_NAME).is_file()
    return scan_indexed(folder, data) if has_index else scan_folder(folder, data, look)


def scan_training(data: DataSection, look: Look | None = None) -> Scan:
    """Return the usable images of `folders`, `sets` and `regularisation_folders`.

    `look` sees each image while it is in memory. With it, captions that cannot be read are findings and no
    errors.

    Raises:
        InputError: A caption, a sidecar or a mask is damaged; or `folders`, a set or
            `regularisation_folders` is given but has no usable image.
    """
    scans: list[Scan] = []
    if data.folders:
        scans.append(_scan_parents(data.folders, data, look, key="data.folders"))
    scans += [_scan_set(image_set, data, look) for image_set in data.sets]
    if data.regularisation_folders:
        weight, key = data.regularisation_weight, "data.regularisation_folders"
        scans.append(_scan_parents(data.regularisation_folders, data, look, key=key, weight=weight))
    joined = Scan.joined(scans)
    if look is None:
        check_readable(joined.captions)
    return joined


def scan_validation(data: DataSection) -> Scan | None:
    """Return the usable images of `validation_folder`.

    Masks are not used: all of an image counts.
    """
    folder = data.validation_folder
    if folder is None:
        return None
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder", hint="set data.validation_folder to a folder of validation images"
        )
    found = find_folders(folder, recursive=data.recursive)
    scan = found.scan(data.model_copy(update={"mask": "none"}))
    check_readable(scan.captions)
    return _not_empty(scan, [folder], hint=_PARENT_HINT.format("data.validation_folder"))


def find_folders(parent: Path, *, recursive: bool = False) -> Found:
    """Return the folders to scan in `parent`: its `N_name` folders or, if there are none, `parent` itself.

    With `recursive`, these are `parent` and all folders below it. Images in and below an `N_name` folder
    have N repeats, others one.

    Raises:
        InputError: `parent` is not a folder, or the name of a folder asks for too many repeats.
    """
    if not parent.is_dir():
        raise InputError(f"{parent} is not a folder", hint=_PARENT_HINT.format("data.folders"))
    if recursive:
        return _find_nested(parent)
    inside = {path: _named(path) for path in folders_in(parent)}
    named = tuple(folder for folder in inside.values() if folder is not None)
    ignored = tuple(path for path, folder in inside.items() if folder is None)
    if named or not has_pictures(parent):
        nested = [path for path in inside if not _is_off(path)]
        below = [image for path in ignored if path in nested for image in pictures_in(path)]
        below += [image for path in nested for image in pictures_below(path)]
        return Found(named, ignored, loose=tuple(pictures_in(parent)), below=tuple(below))
    return Found((_itself(parent),), ignored, below=tuple(pictures_below(parent)))


def _find_nested(parent: Path) -> Found:
    settings = {parent: _itself(parent)}
    ignored: list[Path] = []
    for path in folders_below(parent):
        if _is_off(path):
            ignored.append(path)
        elif path.parent in settings:
            settings[path] = _named(path) or replace(settings[path.parent], path=path)
    return Found(tuple(folder for folder in settings.values() if has_pictures(folder.path)), tuple(ignored))


def _itself(parent: Path) -> ImageFolder:
    """Return the settings of images directly in a folder of the recipe."""
    named = None if _is_off(parent) else _named(parent)
    return named or ImageFolder(parent, 1, "", caption_is_name=False)


def _named(path: Path) -> ImageFolder | None:
    """Return the settings of an `N_name` folder, or None for another name."""
    match = _NAME.fullmatch(path.name)
    if not match or _is_off(path):
        return None
    if int(match[1]) > MOST_REPEATS:
        raise InputError(
            f"the folder {path} asks for {int(match[1]):,} repeats: at most {MOST_REPEATS:,}",
            hint="rename the folder, or train longer with run.epochs",
        )
    return ImageFolder(path, int(match[1]), match[2].strip())


def _is_off(path: Path) -> bool:
    """Return whether a folder is turned off by its name: `0_name`."""
    match = _NAME.fullmatch(path.name)
    return bool(match) and int(match[1]) == 0


def _scan_parents(
    parents: Sequence[Path], data: DataSection, look: Look | None, *, key: str, weight: float = 1.0
) -> Scan:
    found = [find_folders(parent, recursive=data.recursive) for parent in parents]
    scans = [one.scan(data, look, weight=weight) for one in found]
    return _not_empty(Scan.joined(scans), parents, hint=_PARENT_HINT.format(key))


def _scan_set(image_set: ImageSetSection, data: DataSection, look: Look | None) -> Scan:
    if not image_set.path.is_dir():
        raise InputError(f"{image_set.path} is not a folder", hint=_SET_HINT)
    weight = image_set.loss_weight * (data.regularisation_weight if image_set.regularisation else 1)
    folder = ImageFolder(
        image_set.path, image_set.repeats, image_set.caption.strip(), weight, caption_is_name=False
    )
    if not data.recursive:
        found = Found((folder,), below=tuple(pictures_below(image_set.path)))
    else:
        nested = (replace(folder, path=path) for path in folders_below(image_set.path))
        found = Found((folder, *(one for one in nested if has_pictures(one.path))))
    return _not_empty(found.scan(data, look), [image_set.path], hint=_SET_HINT)


def _not_empty(scan: Scan, places: Sequence[Path], *, hint: str) -> Scan:
    if not scan.images:
        warnings = "".join(f"; {warning}" for warning in scan.warnings())
        raise InputError(
            f"no usable image in {some_of([str(place) for place in places])}{warnings}", hint=hint
        )
    return scan
