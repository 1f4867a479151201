"""The files and folders below a folder, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from spectune.errors import InputError
from spectune.training.data.pictures.formats import is_picture

MOST_LOOKED_AT = 100_000  # entries, when images that are not used are counted


def pictures_in(folder: Path) -> list[Path]:
    """Return the files directly in a folder that look like images, by name."""
    return [path for path in _entries(folder) if is_picture(path) and not path.is_dir()]


def folders_in(folder: Path) -> list[Path]:
    """Return the folders directly in a folder, by name, without hidden ones."""
    return [path for path in _entries(folder) if path.is_dir() and not path.name.startswith(".")]


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
    entries = (entry for below in folders_below(folder) for entry in _entries(below))
    found: list[Path] = []
    with suppress(InputError):  # these images are only counted, so an unreadable folder ends the count
        found.extend(path for path in islice(entries, MOST_LOOKED_AT) if is_picture(path))
    return found


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error
