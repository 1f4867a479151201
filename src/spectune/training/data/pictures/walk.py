"""The files and folders below a folder, in a fixed order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

from spectune.errors import InputError
from spectune.training.data.pictures.formats import is_picture
from spectune.training.data.pictures.tar_files import SUFFIX as TAR_SUFFIX

MOST_LOOKED_AT = 100_000  # entries, when images that are not used are counted


def pictures_in(folder: Path) -> list[Path]:
    """Return the files directly in a folder that look like images, by name."""
    return sorted(path for name in file_names(folder) if is_picture(path := folder / name))


def has_pictures(folder: Path) -> bool:
    """Return whether a file directly in a folder looks like an image, or is a tar file."""
    return any(is_picture(path := Path(name)) or is_tar(path) for name in file_names(folder))


def is_tar(path: Path) -> bool:
    """Return whether the name of a file is that of a tar file, which may hold images."""
    return path.suffix.lower() == TAR_SUFFIX


def folders_in(folder: Path) -> list[Path]:
    """Return the folders directly in a folder, by name, without hidden ones."""
    with _readable(folder), os.scandir(folder) as entries:
        return sorted(
            folder / entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
        )


def file_names(folder: Path) -> Iterator[str]:
    """Yield the names of what is directly in a folder and is not a folder."""
    with _readable(folder), os.scandir(folder) as entries:
        yield from (entry.name for entry in entries if not entry.is_dir())


def folders_below(folder: Path) -> Iterator[Path]:
    """Yield all folders below a folder, each before those in it and only once."""
    seen = {folder.resolve()}
    waiting = folders_in(folder)[::-1]
    while waiting:
        path = waiting.pop()
        if (resolved := path.resolve()) in seen:
            continue
        seen.add(resolved)
        yield path
        waiting += folders_in(path)[::-1]


def pictures_below(folder: Path) -> list[Path]:
    """Return the images in all folders below a folder, of the first MOST_LOOKED_AT entries."""
    entries = (below / name for below in folders_below(folder) for name in sorted(file_names(below)))
    found: list[Path] = []
    with suppress(InputError):  # these images are only counted, so an unreadable folder ends the count
        found.extend(path for path in islice(entries, MOST_LOOKED_AT) if is_picture(path))
    return found


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error
