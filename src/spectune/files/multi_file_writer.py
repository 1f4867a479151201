"""Writing a checkpoint to several files; none of them appears before all are complete."""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spectune.files.rename import partial_path, remove_leftovers
from spectune.files.source import TensorInfo
from spectune.files.tensor_writer import TensorWriter
from spectune.files.writer import StreamWriter


@dataclass(frozen=True)
class PlannedFile:
    """One file of a set, before it is written."""

    infos: Sequence[TensorInfo]
    metadata: Mapping[str, str]


class MultiFileWriter(TensorWriter):
    """A writer of several files in a temporary folder beside the target; tensors have single-file names."""

    def __init__(
        self, path: Path, infos: Sequence[TensorInfo], *, metadata: Mapping[str, str] | None, hold: bool
    ) -> None:
        super().__init__(path, infos, metadata=metadata, hold=hold)
        remove_leftovers(self.path)
        self._files: dict[str, StreamWriter] = {}

    def abandon(self) -> None:
        for file in self._files.values():
            file.abandon()
        if not self._keep:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _complete(self) -> None:
        self._add_late_data()
        for file in self._files.values():
            file.close()

    @abstractmethod
    def _add_late_data(self) -> None:
        """Add the data that is known only when all tensors are written."""

    @property
    def _partial(self) -> Path:
        """The folder in which the files are written."""
        return partial_path(self.path)

    def _open_files(self, plan: Mapping[str, PlannedFile], *, reserve_bytes: int) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)  # of an earlier process with the same number
        try:
            for name, planned in plan.items():
                path = self._partial / name
                path.parent.mkdir(parents=True, exist_ok=True)
                self._files[name] = StreamWriter(
                    path,
                    planned.infos,
                    metadata=planned.metadata,
                    reserve_bytes=reserve_bytes,
                    hashed=False,  # this writer hashes under single-file names
                )
        except BaseException:
            self.abandon()
            raise
