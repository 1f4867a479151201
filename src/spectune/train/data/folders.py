"""kohya's folders: a parent holds `N_name` folders, N being how often an epoch repeats their images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from spectune.errors import InputError, some_of
from spectune.train.data.buckets import Size
from spectune.train.data.captions import read_caption
from spectune.train.data.images import SUFFIXES, UnusableImage, open_image

_NAME = re.compile(r"(\d+)_(.*)")


@dataclass(frozen=True)
class ImageFolder:
    path: Path
    repeats: int
    subject: str  # stands in for missing captions


@dataclass(frozen=True)
class CaptionedImage:
    path: Path
    caption: str
    size: Size  # as seen, after EXIF rotation
    repeats: int = 1


@dataclass(frozen=True)
class Scan:
    """What the folders hold, and everything that was left out or made up on the way."""

    images: tuple[CaptionedImage, ...]
    ignored_folders: tuple[Path, ...] = ()
    skipped: tuple[tuple[Path, str], ...] = ()  # image, why
    without_caption: tuple[Path, ...] = ()  # captioned by their folder's name
    empty_caption: tuple[Path, ...] = ()

    def warnings(self) -> list[str]:
        """One line for each kind of thing a person may not have meant."""
        found: list[str] = []
        if self.ignored_folders:
            names = some_of([path.name for path in self.ignored_folders])
            found.append(f"{len(self.ignored_folders)} folders ignored, not named `N_name`: {names}")
        if self.skipped:
            names = some_of([f"{path.name} {why}" for path, why in self.skipped])
            found.append(f"{len(self.skipped)} images skipped: {names}")
        if self.without_caption:
            names = some_of([path.name for path in self.without_caption])
            count = len(self.without_caption)
            found.append(f"{count} images have no caption file, their folder's name is used: {names}")
        if self.empty_caption:
            names = some_of([path.name for path in self.empty_caption])
            found.append(f"{len(self.empty_caption)} captions are empty: {names}")
        return found


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


def scan_parents(parents: Sequence[Path], extensions: Sequence[str]) -> Scan:
    """All usable images below the `N_name` folders of `parents`.

    Raises InputError when there is none.
    """
    folders: list[ImageFolder] = []
    ignored: list[Path] = []
    for parent in parents:
        taken, left = find_folders(parent)
        folders += taken
        ignored += left
    return _scanned(folders, ignored, parents, extensions)


def scan_held_out(folder: Path, extensions: Sequence[str]) -> Scan:
    """All usable images of a validation folder, which holds `N_name` folders or the images themselves."""
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder", hint="data.validation_folder holds images that are not trained on"
        )
    folders, ignored = find_folders(folder)
    if not folders:
        folders, ignored = [ImageFolder(folder, 1, folder.name)], []
    return _scanned(folders, ignored, [folder], extensions)


def _scanned(
    folders: Iterable[ImageFolder],
    ignored: Sequence[Path],
    parents: Sequence[Path],
    extensions: Sequence[str],
) -> Scan:
    files = [(path, folder) for folder in folders for path in _image_files(folder.path)]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        # Decoded once in full: a file cut short is found now and not after an hour of training.
        sizes = list(pool.map(lambda item: _size_or_reason(item[0]), files))
    images: list[CaptionedImage] = []
    skipped: list[tuple[Path, str]] = []
    without: list[Path] = []
    empty: list[Path] = []
    for (path, folder), size in zip(files, sizes, strict=True):
        if isinstance(size, str):
            skipped.append((path, size))
            continue
        caption = read_caption(path, extensions)
        if caption is None:
            without.append(path)
            caption = folder.subject
        elif not caption:
            empty.append(path)
        images.append(CaptionedImage(path, caption, size, folder.repeats))
    scan = Scan(tuple(images), tuple(ignored), tuple(skipped), tuple(without), tuple(empty))
    if not images:
        raise InputError(
            f"no usable image in {some_of([str(parent) for parent in parents])}"
            + "".join(f"; {warning}" for warning in scan.warnings()),
            hint="put images into folders named `N_name` (N = repeats) and name their parent in data.folders",
        )
    return scan


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def _size_or_reason(path: Path) -> Size | str:
    try:
        return Size(*open_image(path).size)
    except UnusableImage as error:
        return str(error)
