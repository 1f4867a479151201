"""Scan the folders of a recipe: kohya's `N_name` folders, and folders with their own settings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spectune.errors import InputError, some_of
from spectune.training.data.captions.findings import check_readable
from spectune.training.data.scan import ImageFolder, Look, Scan, scan_folder
from spectune.training.recipe.sections.data import DataSection, ImageSetSection

_NAME = re.compile(r"(\d+)_(.*)")
_PARENT_HINT = "put images into folders named `N_name` (N = repeats) and list their parent in {}"
_SET_HINT = "set the path of [[data.sets]] to a folder that contains the images directly"


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
        scan = _scan_parents(data.regularisation_folders, data, look, key="data.regularisation_folders")
        weighted = tuple(replace(image, weight=data.regularisation_weight) for image in scan.images)
        scans.append(replace(scan, images=weighted))
    joined = Scan.joined(scans)
    if look is None:
        check_readable(joined.captions)
    return joined


def scan_validation(data: DataSection) -> Scan | None:
    """Return the usable images of `validation_folder`, which contains `N_name` folders or images.

    Masks are not used: all of an image counts.
    """
    folder = data.validation_folder
    if folder is None:
        return None
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder", hint="set data.validation_folder to a folder of validation images"
        )
    folders, ignored = find_folders(folder)
    if not folders:
        folders, ignored = [ImageFolder(folder, 1, folder.name)], []
    scan = _scanned(folders, ignored, data.model_copy(update={"mask": "none"}))
    check_readable(scan.captions)
    return _not_empty(scan, [folder], hint=_PARENT_HINT.format("data.folders"))


def find_folders(parent: Path) -> tuple[list[ImageFolder], list[Path]]:
    """Return the `N_name` folders in `parent`, and the folders with other names.

    Raises:
        InputError: `parent` is not a folder.
    """
    if not parent.is_dir():
        raise InputError(
            f"{parent} is not a folder", hint="list the parents of `N_name` folders in data.folders"
        )
    folders: list[ImageFolder] = []
    ignored: list[Path] = []
    for path in sorted(parent.iterdir()):
        if not path.is_dir() or path.name.startswith("."):
            continue
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) > 0:
            folders.append(ImageFolder(path, int(match[1]), match[2].strip()))
        else:
            ignored.append(path)
    return folders, ignored


def _scan_parents(parents: Sequence[Path], data: DataSection, look: Look | None, *, key: str) -> Scan:
    folders: list[ImageFolder] = []
    ignored: list[Path] = []
    for parent in parents:
        below, others = find_folders(parent)
        folders += below
        ignored += others
    return _not_empty(_scanned(folders, ignored, data, look), parents, hint=_PARENT_HINT.format(key))


def _scan_set(image_set: ImageSetSection, data: DataSection, look: Look | None) -> Scan:
    if not image_set.path.is_dir():
        raise InputError(f"{image_set.path} is not a folder", hint=_SET_HINT)
    weight = image_set.loss_weight * (data.regularisation_weight if image_set.regularisation else 1)
    folder = ImageFolder(
        image_set.path, image_set.repeats, image_set.caption.strip(), weight, caption_is_name=False
    )
    return _not_empty(_scanned([folder], [], data, look), [image_set.path], hint=_SET_HINT)


def _scanned(
    folders: Sequence[ImageFolder], ignored: Sequence[Path], data: DataSection, look: Look | None = None
) -> Scan:
    return Scan.joined([Scan((), tuple(ignored)), *(scan_folder(folder, data, look) for folder in folders)])


def _not_empty(scan: Scan, places: Sequence[Path], *, hint: str) -> Scan:
    if not scan.images:
        warnings = "".join(f"; {warning}" for warning in scan.warnings())
        raise InputError(
            f"no usable image in {some_of([str(place) for place in places])}{warnings}", hint=hint
        )
    return scan
