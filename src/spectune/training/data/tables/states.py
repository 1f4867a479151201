"""The files of a folder with their sizes and times, which tell what changed since an index was made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from spectune.errors import InputError
from spectune.training.data.captions.reading import caption_names
from spectune.training.data.masks import mask_file
from spectune.training.data.tables.index_file import INDEX_NAME
from spectune.training.recipe.sections.data import DataSection

State = tuple[int, int]  # bytes, and time of the last change in ns
GONE = (-1, -1)  # a link to nothing


def file_states(folder: Path) -> Iterator[tuple[str, State]]:
    """Yield the name and the state of each file in a folder but the index."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(INDEX_NAME) and not entry.is_dir():
                    yield entry.name, _state(entry)
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error


def folder_hash(folder: Path) -> str:
    """Return a hash of the names and states of all files in a folder, in any order and without a list."""
    count = total = 0
    for name, (size, time) in file_states(folder):
        count += 1
        data = f"{size} {time} ".encode() + os.fsencode(name)
        total += int.from_bytes(blake2b(data, digest_size=16).digest())
    return f"{count} {total % 2**128:032x}"


def sidecar_hash(folder: Path, data: DataSection) -> str:
    """Return the names and states of the sidecars of a folder."""
    paths = {name: folder / name for name in data.caption.sidecars}
    return repr([(name, _state(path)) for name, path in paths.items() if path.is_file()])


def text_state(image: str, states: dict[str, State], data: DataSection) -> int:
    """Return a hash of the states of the caption files and the mask of an image, 0 if it has none."""
    names = [*caption_names(image, data.caption), mask_file(Path(image), data.mask_suffix).name]
    found = [(name, states[name]) for name in names if name in states]
    digest = blake2b(repr(found).encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, signed=True) if found else 0


def _state(entry: os.DirEntry[str] | Path) -> State:
    try:
        status = entry.stat()
    except OSError:
        return GONE
    return status.st_size, status.st_mtime_ns
