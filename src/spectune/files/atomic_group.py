"""Make several files appear together or not at all, even if the program is killed in between."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, cast

from spectune.files.rename import leftovers, partial_path
from spectune.files.text import load_json

_JOURNAL = ".journal"


class HeldWriter(Protocol):
    """A writer that keeps its finished file under the temporary name until `commit`."""

    @property
    def path(self) -> Path: ...
    def commit(self) -> None: ...
    def abandon(self) -> None: ...


class AtomicGroup:
    """A group of finished files that get their final names together, or are all deleted.

    A journal next to the files lists the names that are about to appear. If the program is killed between two
    renames, the next run finds the journal and removes the incomplete set.
    """

    def __init__(self, journal_of: Path) -> None:
        self._journal_of = journal_of
        self._held: list[HeldWriter] = []
        roll_back(journal_of)

    def add(self, writer: HeldWriter) -> None:
        """Take ownership of `writer`: commit it with the group or abandon it."""
        self._held.append(writer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            for writer in self._held:
                writer.abandon()

    def _commit(self) -> None:
        # only new files: a rollback must not delete a file that existed before
        new = {writer.path for writer in self._held if not writer.path.exists()}
        committed: list[Path] = []
        with journalled(self._journal_of, [path.name for path in new]):
            try:
                for writer in self._held:
                    writer.commit()
                    committed.append(writer.path)
            except BaseException:
                for path in new.intersection(committed):
                    path.unlink(missing_ok=True)
                raise


@contextmanager
def journalled(journal_of: Path, names: Sequence[str]) -> Generator[None]:
    """Keep a journal of the files that appear beside `journal_of` in the block; `roll_back` removes them.

    The journal is removed after the block, unless the program is killed or the disk refuses it.
    """
    journal = partial_path(journal_of, _JOURNAL)
    journal.write_text(json.dumps(names), encoding="utf-8")  # if it is incomplete, no file has appeared yet
    try:
        yield
    finally:
        with suppress(OSError):  # the error that the block raised is the one to report
            journal.unlink(missing_ok=True)


def roll_back(journal_of: Path, *, is_complete: bool = False) -> None:
    """Remove the files that a killed program had already renamed; if they are complete, only the journal."""
    for journal, _ in leftovers(journal_of.parent, re.escape(journal_of.name), _JOURNAL):
        try:
            names = cast(Sequence[object], load_json(journal.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            names = ()
        for name in () if is_complete else names:
            if isinstance(name, str) and Path(name).name == name:
                journal.with_name(name).unlink(missing_ok=True)
        journal.unlink(missing_ok=True)
