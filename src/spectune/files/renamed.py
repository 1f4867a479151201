"""Open files as one file whose tensors have other names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from spectune.files.source import TensorFile, TensorInfo


@dataclass(frozen=True)
class RenamedTensor:
    """A tensor under its new name, and the function that loads it."""

    info: TensorInfo
    load: Callable[[], Tensor]


class RenamedFiles:
    """Several files as one, with other tensor names."""

    def __init__(self, entries: Mapping[str, RenamedTensor], files: Sequence[TensorFile]) -> None:
        self.metadata: Mapping[str, str] = {}
        self.tensors: Mapping[str, TensorInfo] = {name: entry.info for name, entry in entries.items()}
        self._entries = entries
        self._files = files

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(path for file in self._files for path in file.paths)

    def load(self, name: str) -> Tensor:
        return self._entries[name].load()

    def close(self) -> None:
        for file in self._files:
            file.close()
