"""Scan a folder through its index, which is updated first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from spectune.errors import InputError
from spectune.files.pipeline import Progress
from spectune.files.text import load_json
from spectune.training.data.captions.findings import CaptionFinding, FindingKind
from spectune.training.data.pictures.formats import formats
from spectune.training.data.scan import Scan
from spectune.training.data.tables.images import FolderImages, ImageFolder
from spectune.training.data.tables.index_file import INDEX_NAME, Head, ImageBit, Index, MappedColumns, damaged
from spectune.training.data.tables.sequences import Mapped
from spectune.training.data.tables.states import folder_hash, sidecar_hash
from spectune.training.data.tables.strings import Strings
from spectune.training.data.tables.update import FileChanges, IndexUpdate
from spectune.training.recipe.sections.data import DataSection

_VERSION = 1  # raise it when a change affects what an index has
_VARIED = {"shuffle", "keep_tokens", "dropout_probability", "tag_dropout_probability"}  # by draws, not here


@dataclass(frozen=True)
class Indexed:
    """An index that fits its folder."""

    index: Index
    changes: FileChanges
    is_written: bool  # else it is in memory only


def scan_indexed(folder: ImageFolder, data: DataSection) -> Scan:
    """Return the contents of a folder through its index, which is updated first if files changed.

    Raises:
        InputError: The index, a sidecar or a mask is damaged.
    """
    return scan_of(update_index(folder, data), folder, data)


def scan_of(found: Indexed, folder: ImageFolder, data: DataSection) -> Scan:
    """Return the contents of a folder from its index."""
    path, index = folder.path / INDEX_NAME, found.index
    columns = MappedColumns.of_index(path, index) if found.is_written else index.columns

    def paths(has: np.ndarray[Any, Any]) -> Sequence[Path]:
        rows = cast("Sequence[int]", np.flatnonzero(has))
        return Mapped(rows, lambda row: folder.path / index.names[row])

    def below(names: Strings) -> Sequence[Path]:
        return Mapped(names, lambda name: folder.path / name)

    flags = index.flags
    named = (flags & ImageBit.OWN_CAPTION == 0) & folder.caption_is_name
    masked = flags & ImageBit.ALPHA > 0 if data.mask == "alpha" else index.masks
    return Scan(
        images=FolderImages(columns, folder, data.mask_suffix),
        unread=below(index.unread),
        skipped=tuple(
            (folder.path / name, why) for name, why in zip(index.skipped, index.reasons, strict=True)
        ),
        several_frames=paths(flags & ImageBit.FRAMES > 0),
        converted=paths(flags & ImageBit.CONVERTED > 0),
        unusable_profile=paths(flags & ImageBit.UNUSABLE_PROFILE > 0),
        shared_files=below(index.shared),
        without_caption=paths(named),
        empty_caption=paths((flags & ImageBit.EMPTY_CAPTION > 0) & ~named),
        without_image=index.without_image,
        without_mask=paths(~masked & (data.mask != "none")),
        unused_masks=below(index.unused_masks),
        captions=tuple(_findings(path, index)),
        unwritable=() if found.is_written else (folder.path,),
    )


def update_index(
    folder: ImageFolder,
    data: DataSection,
    *,
    check: bool = False,
    anew: bool = False,
    progress: Progress | None = None,
) -> Indexed:
    """Return the index of a folder; read only the files that are new or changed since it was written.

    Args:
        folder: The folder, whose caption the images without one get.
        data: The settings of captions and masks.
        check: Decode images completely. Else their headers must be enough, so damaged files are not found.
        anew: Ignore an index that exists.
        progress: Called with the number of images whose header was read, and their total.

    Raises:
        InputError: The index, a caption, a sidecar or a mask is damaged.
    """
    path = folder.path / INDEX_NAME
    head = Head(_settings(folder, data), folder_hash(folder.path), sidecar_hash(folder.path, data))
    old = Index.load(path) if path.is_file() and not anew else None
    if old is not None and _is_current(old, head) and (not check or _is_checked(old)):
        return Indexed(old, FileChanges(), is_written=True)
    if old is not None:
        old = Index.load(path, mapped=False)  # Windows cannot replace a file that is mapped
    update = IndexUpdate(folder, data, head, old, check=check, progress=progress)
    index = update.run()
    try:
        index.save(path)
    except (OSError, InputError):
        return Indexed(index, update.changes, is_written=False)
    return Indexed(Index.load(path), update.changes, is_written=True)


def _is_current(old: Index, head: Head) -> bool:
    return (old.head.settings, old.head.files, old.head.sidecar) == (head.settings, head.files, head.sidecar)


def _is_checked(old: Index) -> bool:
    return bool((old.flags & ImageBit.CHECKED).all())


def _settings(folder: ImageFolder, data: DataSection) -> str:
    rules = data.caption.model_dump(mode="json", exclude=_VARIED)
    return json.dumps([_VERSION, formats(), folder.caption, rules, data.mask, data.mask_suffix])


def _findings(path: Path, index: Index) -> Iterator[CaptionFinding]:
    """Yield the findings in the captions of an index."""
    notes = (index.notes[row] for row in index.notes.with_text().tolist())
    try:
        for text in (index.head.findings, *notes):
            for kind, name, detail, tokens in cast("list[tuple[str, str, str, int]]", load_json(text)):
                yield CaptionFinding(FindingKind(kind), path.parent / name, str(detail), int(tokens))
    except (TypeError, ValueError) as error:
        raise damaged(path) from error
