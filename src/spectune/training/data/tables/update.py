"""Read what is new or changed in a folder since its index was made."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from spectune.errors import InputError
from spectune.files.pipeline import Progress, report_progress
from spectune.training.data.buckets import Size
from spectune.training.data.captions.findings import CaptionFinding
from spectune.training.data.captions.reading import ImageCaption, read_captions
from spectune.training.data.facts import Facts, read_facts
from spectune.training.data.pictures.formats import is_picture
from spectune.training.data.pictures.profiles import ProfileKind
from spectune.training.data.pictures.tar_files import SUFFIX as TAR_SUFFIX
from spectune.training.data.pictures.tar_files import member_of, read_tar
from spectune.training.data.scan import Files, has_mask, sharing
from spectune.training.data.tables.images import ImageFolder
from spectune.training.data.tables.index_file import Head, ImageBit, Index
from spectune.training.data.tables.states import GONE, State, file_states, text_state
from spectune.training.data.tables.strings import Strings
from spectune.training.recipe.sections.data import DataSection

_AT_ONCE = 4096  # images whose results wait in memory


@dataclass
class FileChanges:
    """The names of what an update of an index read, and of what is gone."""

    added: list[str] = field(default_factory=list[str])
    changed: list[str] = field(default_factory=list[str])
    removed: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class _Source:
    """A picture file or a member of a tar file."""

    name: str  # below the folder
    state: State
    text_state: int
    texts: tuple[str, ...] | None = None  # caption files of a member of a tar file


@dataclass(frozen=True)
class _Looked:
    """The facts about an image, or the reason to skip it."""

    source: _Source
    facts: Facts | str
    is_checked: bool  # it was decoded
    is_new: bool  # it was read now


@dataclass(frozen=True)
class _Row:
    """A usable image."""

    source: _Source
    facts: Facts
    is_checked: bool
    has_mask: bool
    caption: str
    template: str
    is_own: bool
    is_empty: bool
    notes: str


def _notes(findings: Iterable[CaptionFinding], folder: Path) -> str:
    rows = [[one.kind, os.path.relpath(one.path, folder), one.detail, one.tokens] for one in findings]
    return json.dumps(rows) if rows else ""


class IndexUpdate:
    """Reads what is new or changed in a folder."""

    def __init__(
        self,
        folder: ImageFolder,
        data: DataSection,
        head: Head,
        old: Index | None,
        *,
        check: bool,
        progress: Progress | None,
    ) -> None:
        self.folder, self.data, self.head, self.check, self.progress = folder, data, head, check, progress
        self.changes = FileChanges()
        self.old = old
        self._rows = {} if old is None else {name: row for row, name in enumerate(old.names)}
        self._skipped = {} if old is None else {name: row for row, name in enumerate(old.skipped)}
        # captions of an index with other settings, or from a changed sidecar, are read again
        self._keeps_texts = old is not None and (
            (old.head.settings, old.head.sidecar) == (head.settings, head.sidecar)
        )
        self._members_of: dict[str, list[str]] = defaultdict(list)
        for name in (*self._rows, *self._skipped):
            if (tar := name.partition("/")[0]).lower().endswith(TAR_SUFFIX):
                self._members_of[tar].append(name)
        self.skipped: list[_Looked] = []

    def run(self) -> Index:
        """Return the new index."""
        states = dict(file_states(self.folder.path))
        files = Files.of(self.folder.path, states, self.data.mask_suffix)
        if files.tars and self.data.mask == "file":
            raise InputError(
                f"{self.folder.path} has tar files, in which masks are not read",
                hint='set data.mask to "alpha" or "none", or unpack the tar files',
            )
        sources = [
            _Source(path.name, states[path.name], text_state(path.name, states, self.data))
            for path in files.images
        ]
        for tar in files.tars:
            sources += self._members(tar, states[tar.name])
        looked = list(self._look_at(sources))
        self.skipped += [one for one in looked if isinstance(one.facts, str)]
        usable = [one for one in looked if not isinstance(one.facts, str)]
        rows = self._captioned(usable, [self.folder.path / source.name for source in sources])
        self._note_changes(looked)
        used_masks = {Path(row.source.name).stem + self.data.mask_suffix for row in rows if row.has_mask}
        return self._index(files, rows, used_masks)

    def _note_changes(self, looked: Sequence[_Looked]) -> None:
        old = {*self._rows, *self._skipped}
        now = {one.source.name: one.is_new for one in (*looked, *self.skipped)}
        self.changes.added = [name for name in now if name not in old]
        self.changes.changed = [
            name for name, is_new in now.items() if name in old and (is_new or name in self.captioned)
        ]
        self.changes.removed = [name for name in (*self._rows, *self._skipped) if name not in now]

    def _members(self, tar: Path, state: State) -> Iterator[_Source]:
        known = self._members_of[tar.name] if self._keeps_texts else []
        if known and self._old_state(known[0]) == state:  # do not read the headers of the members again
            for name in known:
                if name in self._rows or member_of(self.folder.path / name) is not None:
                    yield _Source(name, state, 0)
                else:
                    assert self.old is not None
                    reason = self.old.reasons[self._skipped[name]]
                    self.skipped.append(_Looked(_Source(name, state, 0), reason, True, False))
            return
        samples, skipped = read_tar(tar)
        self.skipped += [_Looked(_Source(name, state, 0), reason, True, True) for name, reason in skipped]
        for sample in samples:
            texts = [sample.names[one[1:]] for one in self.data.caption.extensions if one[1:] in sample.names]
            pictures = [name for name in sample.names.values() if is_picture(Path(name))]
            yield from (_Source(name, state, 0, tuple(texts)) for name in pictures)

    def _old_state(self, name: str) -> State | None:
        """Return the state of an image in the old index, None if it is not there."""
        if self.old is None:
            return None
        if (row := self._rows.get(name)) is not None:
            size, time = self.old.states[row].tolist()
        elif (row := self._skipped.get(name)) is not None:
            size, time, _ = self.old.skipped_states[row].tolist()
        else:
            return None
        return size, time

    def _look_at(self, sources: Sequence[_Source]) -> Iterator[_Looked]:
        waiting, done = iter(sources), 0
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            while chunk := list(islice(waiting, _AT_ONCE)):
                yield from pool.map(self._facts, chunk)
                done += len(chunk)
                report_progress(self.progress, done, len(sources), chunk[-1].name)

    def _facts(self, source: _Source) -> _Looked:
        if source.state != GONE and self._old_state(source.name) == source.state:
            assert self.old is not None
            row = self._rows.get(source.name)
            if row is not None:
                facts, is_checked = _facts_of(self.old, row), bool(self.old.flags[row] & ImageBit.CHECKED)
            else:
                row = self._skipped[source.name]
                facts, is_checked = self.old.reasons[row], bool(self.old.skipped_states[row, 2])
            if is_checked or not self.check:
                return _Looked(source, facts, is_checked, is_new=False)
        facts = read_facts(self.folder.path / source.name, decode=self.check)
        return _Looked(source, facts, self.check, is_new=True)

    def _captioned(self, usable: Sequence[_Looked], files: Sequence[Path]) -> list[_Row]:
        """Return the rows of all usable images; captions that have not changed are not read."""
        fresh = [one.source for one in usable if not self._keeps_text(one.source)]
        read = read_captions(
            self.folder.path,
            [self.folder.path / source.name for source in fresh],
            self.data.caption,
            default=self.folder.caption,
            files=files,
            texts={
                self.folder.path / one.name: [self.folder.path / name for name in one.texts]
                for one in fresh
                if one.texts is not None
            },
        )
        self.without_image = read.without_image
        self.findings = _notes(read.sidecar_findings, self.folder.path) or "[]"
        captions = {source.name: one for source, one in zip(fresh, read.captions, strict=True)}
        self.captioned = captions.keys()
        return [self._row(one, captions.get(one.source.name)) for one in usable]

    def _keeps_text(self, source: _Source) -> bool:
        """Return whether the old index has the caption and mask of an image: their files are unchanged."""
        if not self._keeps_texts or self.old is None or self._old_state(source.name) != source.state:
            return False
        row = self._rows.get(source.name)
        return row is not None and int(self.old.text_states[row]) == source.text_state

    def _row(self, one: _Looked, caption: ImageCaption | None) -> _Row:
        """Return the row of an image, with the caption and the mask of the old index if `caption` is None."""
        assert isinstance(one.facts, Facts)
        if caption is not None:
            path = self.folder.path / one.source.name
            return _Row(
                one.source,
                one.facts,
                one.is_checked,
                has_mask=self.data.mask == "file" and has_mask(path, one.facts, self.data),
                caption=caption.fixed,
                template="" if caption.template == caption.fixed else caption.template,
                is_own=caption.is_own,
                is_empty=caption.is_empty,
                notes=_notes(caption.findings, self.folder.path),
            )
        assert self.old is not None
        old, row = self.old, self._rows[one.source.name]
        return _Row(
            one.source,
            one.facts,
            one.is_checked,
            has_mask=bool(old.masks[row]),
            caption=old.captions[row],
            template=old.templates[row],
            is_own=bool(old.flags[row] & ImageBit.OWN_CAPTION),
            is_empty=bool(old.flags[row] & ImageBit.EMPTY_CAPTION),
            notes=old.notes[row],
        )

    def _index(self, files: Files, rows: Sequence[_Row], used_masks: set[str]) -> Index:
        head, skipped = self.head, self.skipped
        states = [(*one.source.state, one.is_checked) for one in skipped]
        return Index(
            head=Head(head.settings, head.files, head.sidecar, self.findings),
            names=Strings.of(row.source.name for row in rows),
            captions=Strings.of(row.caption for row in rows),
            templates=Strings.of(row.template for row in rows),
            notes=Strings.of(row.notes for row in rows),
            skipped=Strings.of(one.source.name for one in skipped),
            reasons=Strings.of(str(one.facts) for one in skipped),
            unread=Strings.of(path.name for path in files.unread),
            unused_masks=Strings.of(path.name for path in files.masks if path.name not in used_masks),
            without_image=Strings.of(self.without_image),
            shared=Strings.of(path.name for path in sharing(files.images, self.data)),
            sizes=np.array([tuple(row.facts.size) for row in rows], dtype=np.int32).reshape(-1, 2),
            masks=np.array([row.has_mask for row in rows], dtype=np.bool_),
            flags=np.array([_flags(row) for row in rows], dtype=np.uint8),
            states=np.array([row.source.state for row in rows], dtype=np.int64).reshape(-1, 2),
            text_states=np.array([row.source.text_state for row in rows], dtype=np.int64),
            skipped_states=np.array(states, dtype=np.int64).reshape(-1, 3),
        )


def _flags(row: _Row) -> int:
    facts = row.facts
    bits = {
        ImageBit.FRAMES: facts.has_more_frames,
        ImageBit.CONVERTED: facts.profile is ProfileKind.OTHER,
        ImageBit.UNUSABLE_PROFILE: facts.profile is ProfileKind.UNUSABLE,
        ImageBit.ALPHA: facts.has_alpha,
        ImageBit.OWN_CAPTION: row.is_own,
        ImageBit.EMPTY_CAPTION: row.is_empty,
        ImageBit.CHECKED: row.is_checked,
    }
    return sum(bit for bit, is_set in bits.items() if is_set)


def _facts_of(index: Index, row: int) -> Facts:
    flags = int(index.flags[row])
    profile = ProfileKind.NONE  # or sRGB, which is the same here
    if flags & ImageBit.CONVERTED:
        profile = ProfileKind.OTHER
    elif flags & ImageBit.UNUSABLE_PROFILE:
        profile = ProfileKind.UNUSABLE
    return Facts(
        Size(*index.sizes[row].tolist()), bool(flags & ImageBit.ALPHA), bool(flags & ImageBit.FRAMES), profile
    )
