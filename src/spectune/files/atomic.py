"""Files that belong together appear together, even if the program is killed in between."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, cast


class HeldWriter(Protocol):
    """A writer that leaves its finished file under the temporary name until `commit`."""

    @property
    def path(self) -> Path: ...
    def commit(self) -> None: ...
    def abandon(self) -> None: ...


class Together:
    """Gives several finished files their names at once, or drops them all.

    A journal beside them says which names are about to appear. Where a program was killed between two of
    them, the next run finds the journal and takes away what is only a part.
    """

    def __init__(self, journal_of: Path) -> None:
        self._journal = journal_of.with_name(f".{journal_of.name}.journal")
        self._held: list[HeldWriter] = []
        _undo(self._journal)

    def hold(self, writer: HeldWriter) -> None:
        """Answer for a writer from here on."""
        self._held.append(writer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                # a file that is replaced on purpose stays when the other one is missing
                fresh = [writer.path.name for writer in self._held if not writer.path.exists()]
                self._journal.write_text(json.dumps(fresh), encoding="utf-8")
                for writer in self._held:
                    writer.commit()
                self._journal.unlink()
        finally:
            for writer in self._held:
                writer.abandon()


def _undo(journal: Path) -> None:
    """Take away what a killed program had already named."""
    try:
        names = cast(Sequence[object], json.loads(journal.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return
    for name in names:
        if isinstance(name, str) and Path(name).name == name:
            journal.with_name(name).unlink(missing_ok=True)
    journal.unlink(missing_ok=True)
