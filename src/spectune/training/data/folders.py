"""Folders of captioned images, kohya's `N_name` or listed one by one, and what lies beside the images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from spectune.errors import InputError, some_of
from spectune.training.data.buckets import Size
from spectune.training.data.captions import read_caption, read_sidecar
from spectune.training.data.images import SUFFIXES, UnusableImage, as_rgb, has_alpha, load_image
from spectune.training.data.masks import MASK_SUFFIX, MaskSource, is_mask, mask_file, open_mask

_NAME = re.compile(r"(\d+)_(.*)")
# Resized to cover its bucket, a strip 1 pixel wide would fill gigabytes.
LONGEST_ASPECT = 32


@dataclass(frozen=True)
class ImageFolder:
    path: Path
    repeats: int
    subject: str  # stands in for missing captions
    weight: float = 1.0  # of the loss
    subject_is_given: bool = False  # by the recipe, not taken from the folder's name


@dataclass(frozen=True)
class ImageSet:
    """One folder of images with settings of its own."""

    path: Path  # holds the images themselves
    repeats: int = 1
    caption: str = ""  # of images without a caption
    loss_weight: float = 1.0
    regularisation: bool = False  # weighted by the weight of regularisation images too


@dataclass(frozen=True)
class FilesBeside:
    """Which files in a folder of images say something about them."""

    extensions: tuple[str, ...] = (".txt", ".caption")
    sidecar: str = ""  # name of a JSONL file of captions; "": none
    mask: MaskSource = "none"
    mask_suffix: str = MASK_SUFFIX  # such files are never images, whatever the source of masks


CAPTION_FILES = FilesBeside()


@dataclass(frozen=True)
class CaptionedImage:
    path: Path
    caption: str
    size: Size  # as seen, after EXIF rotation
    repeats: int = 1
    weight: float = 1.0  # of its loss
    mask: Path | None = None  # grey image beside it


@dataclass(frozen=True)
class Scan:
    """What the folders hold, and everything that was left out or made up on the way."""

    images: tuple[CaptionedImage, ...]
    ignored_folders: tuple[Path, ...] = ()
    skipped: tuple[tuple[Path, str], ...] = ()  # image, why
    without_caption: tuple[Path, ...] = ()  # captioned by their folder's name
    empty_caption: tuple[Path, ...] = ()
    without_image: tuple[str, ...] = ()  # entries of sidecars
    without_mask: tuple[Path, ...] = ()  # where masks are asked for
    unused_masks: tuple[Path, ...] = ()

    def warnings(self) -> list[str]:
        """One line for each kind of thing a person may not have meant."""
        found: list[str] = []
        if self.ignored_folders:
            names = _names(self.ignored_folders)
            found.append(f"{len(self.ignored_folders)} folders ignored, not named `N_name`: {names}")
        if self.skipped:
            names = some_of([f"{path.name} {why}" for path, why in self.skipped])
            found.append(f"{len(self.skipped)} images skipped: {names}")
        if self.without_caption:
            found.append(
                f"{len(self.without_caption)} images have no caption file, "
                f"their folder's name is used: {_names(self.without_caption)}"
            )
        if self.empty_caption:
            found.append(f"{len(self.empty_caption)} captions are empty: {_names(self.empty_caption)}")
        if self.without_image:
            found.append(
                f"{len(self.without_image)} captions of sidecars have no image: {some_of(self.without_image)}"
            )
        if self.without_mask:
            found.append(
                f"{len(self.without_mask)} images have no mask and count fully: {_names(self.without_mask)}"
            )
        if self.unused_masks:
            found.append(f"{len(self.unused_masks)} mask files are not used: {_names(self.unused_masks)}")
        return found


def _names(paths: Sequence[Path]) -> str:
    return some_of([path.name for path in paths])


def find_folders(parent: Path) -> tuple[list[ImageFolder], list[Path]]:
    """The `N_name` folders in `parent`, and the folders that are not of that form.

    Raises InputError when `parent` is not a folder.
    """
    if not parent.is_dir():
        raise InputError(
            f"{parent} is not a folder", hint="data.folders names the parents of `N_name` folders"
        )
    taken: list[ImageFolder] = []
    ignored: list[Path] = []
    for path in sorted(
        child for child in parent.iterdir() if child.is_dir() and not child.name.startswith(".")
    ):
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) > 0:
            taken.append(ImageFolder(path, int(match[1]), match[2].strip()))
        else:
            ignored.append(path)
    return taken, ignored


def scan_data(
    parents: Sequence[Path] = (),
    sets: Sequence[ImageSet] = (),
    *,
    regularisation_parents: Sequence[Path] = (),
    regularisation_weight: float = 1.0,
    beside: FilesBeside = CAPTION_FILES,
) -> Scan:
    """All usable images of a run: below the `N_name` folders of `parents`, of `sets`, and of a class to keep.

    Raises InputError when one of the three is named and holds no usable image, a single set included, and for
    damaged sidecars and masks.
    """
    scans: list[Scan] = []
    if parents or not sets:
        scans.append(_scan_parents(parents, beside, key="data.folders"))
    for image_set in sets:
        scans.append(_scan_set(image_set, regularisation_weight, beside))
    if regularisation_parents:
        kept = _scan_parents(regularisation_parents, beside, key="data.regularisation_folders")
        weighted = tuple(replace(image, weight=regularisation_weight) for image in kept.images)
        scans.append(replace(kept, images=weighted))
    return _joined(scans)


def scan_parents(parents: Sequence[Path], extensions: Sequence[str]) -> Scan:
    """All usable images below the `N_name` folders of `parents`.

    Raises InputError when there is none.
    """
    return scan_data(parents, beside=FilesBeside(tuple(extensions)))


def scan_held_out(
    folder: Path, extensions: Sequence[str], *, sidecar: str = "", mask_suffix: str = MASK_SUFFIX
) -> Scan:
    """All usable images of a validation folder, which holds `N_name` folders or the images themselves."""
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder", hint="data.validation_folder holds images that are not trained on"
        )
    folders, ignored = find_folders(folder)
    if not folders:
        folders, ignored = [ImageFolder(folder, 1, folder.name)], []
    beside = FilesBeside(tuple(extensions), sidecar, mask_suffix=mask_suffix)
    return _some(_scanned(folders, ignored, beside), [folder], hint=_PARENT_HINT.format("data.folders"))


_PARENT_HINT = "put images into folders named `N_name` (N = repeats) and name their parent in {}"


def _scan_parents(parents: Sequence[Path], beside: FilesBeside, *, key: str) -> Scan:
    folders: list[ImageFolder] = []
    ignored: list[Path] = []
    for parent in parents:
        taken, left = find_folders(parent)
        folders += taken
        ignored += left
    return _some(_scanned(folders, ignored, beside), parents, hint=_PARENT_HINT.format(key))


def _scan_set(image_set: ImageSet, regularisation_weight: float, beside: FilesBeside) -> Scan:
    hint = "[[data.sets]] path names a folder that holds the images themselves"
    if not image_set.path.is_dir():
        raise InputError(f"{image_set.path} is not a folder", hint=hint)
    weight = image_set.loss_weight * (regularisation_weight if image_set.regularisation else 1)
    folder = ImageFolder(
        image_set.path, image_set.repeats, image_set.caption.strip(), weight, subject_is_given=True
    )
    return _some(_scanned([folder], [], beside), [image_set.path], hint=hint)


def _some(scan: Scan, places: Sequence[Path], *, hint: str) -> Scan:
    """`scan`, if it has found an image."""
    if not scan.images:
        raise InputError(
            f"no usable image in {some_of([str(place) for place in places])}"
            + "".join(f"; {warning}" for warning in scan.warnings()),
            hint=hint,
        )
    return scan


def _scanned(folders: Iterable[ImageFolder], ignored: Sequence[Path], beside: FilesBeside) -> Scan:
    return _joined([Scan((), tuple(ignored)), *(_scan_folder(folder, beside) for folder in folders)])


def _joined(scans: Sequence[Scan]) -> Scan:
    parts: dict[str, Any] = {
        field.name: tuple(chain.from_iterable(getattr(scan, field.name) for scan in scans))
        for field in fields(Scan)
    }
    return Scan(**parts)


@dataclass(frozen=True)
class _Look:
    size: Size
    has_mask: bool


def _scan_folder(folder: ImageFolder, beside: FilesBeside) -> Scan:
    masks, files = _files(folder.path, beside.mask_suffix)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        # Decoded once in full: a file cut short is found now and not after an hour of training.
        looks = list(pool.map(lambda path: _look_or_reason(path, beside), files))
    sidecar = folder.path / beside.sidecar
    entries = read_sidecar(sidecar) if beside.sidecar and sidecar.is_file() else {}
    seen = [(path, look) for path, look in zip(files, looks, strict=True) if not isinstance(look, str)]
    said = {path: _said_of(path, entries, beside) for path, _ in seen}
    images = [
        CaptionedImage(
            path,
            caption=folder.subject if (text := said[path]) is None else text,
            size=look.size,
            repeats=folder.repeats,
            weight=folder.weight,
            mask=mask_file(path, beside.mask_suffix) if beside.mask == "file" and look.has_mask else None,
        )
        for path, look in seen
    ]
    named = {path for path, text in said.items() if text is None and not folder.subject_is_given}
    used = {image.mask for image in images}
    return Scan(
        images=tuple(images),
        skipped=tuple((path, look) for path, look in zip(files, looks, strict=True) if isinstance(look, str)),
        without_caption=tuple(path for path, _ in seen if path in named),
        empty_caption=tuple(image.path for image in images if not image.caption and image.path not in named),
        without_image=tuple(sorted(entries.keys() - {path.name for path in files})),
        without_mask=tuple(path for path, look in seen if beside.mask != "none" and not look.has_mask),
        unused_masks=tuple(path for path in masks if path not in used),
    )


def _said_of(image: Path, entries: Mapping[str, str], beside: FilesBeside) -> str | None:
    """What a file beside an image says of it, or else a sidecar, or None."""
    caption = read_caption(image, beside.extensions)
    return entries.get(image.name) if caption is None else caption


def _files(folder: Path, mask_suffix: str) -> tuple[list[Path], list[Path]]:
    """The masks and the images in a folder."""
    found = sorted(path for path in folder.iterdir() if path.is_file())
    masks = [path for path in found if is_mask(path, mask_suffix)]
    taken = set(masks)
    return masks, [path for path in found if path.suffix.lower() in SUFFIXES and path not in taken]


def _look_or_reason(path: Path, beside: FilesBeside) -> _Look | str:
    try:
        if not path.stat().st_size:
            return "is an empty file"
        loaded = load_image(path)
        size = Size(*as_rgb(loaded).size)
        if max(size.aspect, 1 / size.aspect) > LONGEST_ASPECT:
            return f"is {size.width}x{size.height}, longer than {LONGEST_ASPECT} times its shorter side"
        if beside.mask == "alpha":
            return _Look(size, has_alpha(loaded))
        mask = mask_file(path, beside.mask_suffix)
        has_mask = beside.mask == "file" and mask.is_file()
        if has_mask:
            open_mask(mask, size)
        return _Look(size, has_mask)
    except UnusableImage as error:
        return str(error)
