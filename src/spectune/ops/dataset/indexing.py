"""Write the indexes of folders of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spectune.errors import InputError, some_of
from spectune.operation import operation
from spectune.ops.options.dataset import IndexOptions
from spectune.training.data.folders import find_folders
from spectune.training.data.pictures.walk import has_pictures
from spectune.training.data.scan import Scan
from spectune.training.data.tables.images import ImageFolder
from spectune.training.data.tables.index_file import INDEX_NAME, Index
from spectune.training.data.tables.indexing import scan_of, update_index
from spectune.training.recipe.sections.data import DataSection


@dataclass(frozen=True)
class IndexedFolder:
    """The index of one folder, and the names of the files that were read or are gone."""

    folder: Path
    file: Path
    images: int
    nbytes: int
    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]


@dataclass(frozen=True)
class IndexReport:
    """The indexes of some folders, with possible mistakes in them."""

    folders: tuple[IndexedFolder, ...]
    warnings: tuple[str, ...]


@operation(IndexOptions)
def dataset_index(options: IndexOptions) -> IndexReport:
    """Write an index into each folder of pictures, or update it.

    Raises:
        InputError: There is no picture, a sidecar is damaged, or a folder is not writable.
    """
    found = [find_folders(parent, recursive=options.recursive) for parent in options.folders]
    folders = [folder for one in found for folder in one.folders if has_pictures(folder.path)]
    if not folders:
        raise InputError(
            f"no picture or tar file in {some_of([str(folder) for folder in options.folders])}",
            hint="pass folders with pictures; `recursive` includes nested folders",
        )
    data = DataSection(folders=options.folders, recursive=options.recursive)
    unused = [Scan((), ignored_folders=one.ignored, loose=one.loose, below=one.below) for one in found]
    done = [_indexed(folder, data, options) for folder in folders]
    scan = Scan.joined([*unused, *(one for _, one in done)])
    return IndexReport(tuple(one for one, _ in done), tuple(scan.warnings()))


def _indexed(folder: ImageFolder, data: DataSection, options: IndexOptions) -> tuple[IndexedFolder, Scan]:
    path = folder.path / INDEX_NAME
    is_damaged = False
    try:
        if path.is_file():
            Index.load(path)
    except InputError as error:
        options.tell(f"the index is made again: {error}")
        is_damaged = True
    indexed = update_index(folder, data, check=options.check, anew=is_damaged, progress=options.progress)
    if not indexed.is_written:
        raise InputError(f"{path} cannot be written", hint="make its folder writable, or free the disk")
    changes = indexed.changes
    row = IndexedFolder(
        folder=folder.path,
        file=path,
        images=len(indexed.index.names),
        nbytes=path.stat().st_size,
        added=tuple(changes.added),
        changed=tuple(changes.changed),
        removed=tuple(changes.removed),
    )
    return row, scan_of(indexed, folder, data)
