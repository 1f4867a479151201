"""A checkpoint written to several files, none of which appears before all are complete."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from spectune.errors import some_of
from spectune.files.source import TensorInfo
from spectune.files.weights_hash import WeightsHasher
from spectune.files.writer import StreamWriter, partial_path, remove_leftovers


@dataclass(frozen=True)
class PlannedFile:
    """One file of a set, before it is written."""

    infos: Sequence[TensorInfo]
    metadata: Mapping[str, str]


class MultiFileWriter(ABC):
    """What writers of several files have in common; to its callers it is a StreamWriter.

    Takes the tensors announced in `infos` under single-file names, in any order, each once. The files are
    written into a temporary folder beside the target, which disappears when anything fails; only finished
    files that cannot get their names stay, and the error names them. With `hold` they wait for `commit`.
    `hash` is the weights hash of the tensors as they came, so it does not depend on how they are stored.
    """

    def __init__(
        self,
        path: Path,
        infos: Sequence[TensorInfo],
        *,
        metadata: Mapping[str, str] | None,
        hold: bool,
    ) -> None:
        self.path = path
        self.metadata: dict[str, str] = dict(metadata or {})
        self._hold = hold
        self._infos = {info.name: info for info in infos}
        assert len(self._infos) == len(infos), "a tensor is announced twice"
        self._waiting = set(self._infos)
        self._hasher = WeightsHasher()
        self._hash: str | None = None
        self._files: dict[str, StreamWriter] = {}
        self._keep = False

    @property
    def hash(self) -> str:
        """The weights hash of the written tensors."""
        assert self._hash is not None, "the hash is known when the files are closed"
        return self._hash

    def differing(self, other: WeightsHasher) -> int:
        """Count the tensors that differ in any bit from those of `other`."""
        return self._hasher.differing(other)

    def hash_ahead(self, name: str, tensor: Tensor) -> None:
        """Hash a tensor from any thread; `write` then does not hash it again."""
        self._hasher.add(name, tensor)

    @property
    def waiting(self) -> frozenset[str]:
        """The names of the tensors not written yet."""
        return frozenset(self._waiting)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one announced tensor; dtype and shape must be as announced."""
        info = self._infos[name]
        assert name in self._waiting, f"{name} is written twice"
        assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape), (
            f"{name}: expected {info.dtype} {info.shape}, got {tensor.dtype} {tuple(tensor.shape)}"
        )
        tensor = tensor.detach().cpu()
        if name not in self._hasher:
            self._hasher.add(name, tensor)
        self._put(name, tensor)
        self._waiting.remove(name)

    def close(self) -> None:
        """Finish the files and, unless they are held, give them their names."""
        if self._waiting:
            missing = sorted(self._waiting)
            raise AssertionError(
                f"{len(missing)} tensors of {self.path.name} were never written: {some_of(missing)}"
            )
        self._complete()
        for file in self._files.values():
            file.close()
        self._hash = self._hasher.hexdigest()
        if not self._hold:
            self.commit()

    @abstractmethod
    def commit(self) -> None:
        """Give the finished files their names.

        Raises InputError, and leaves them where they are, when that is not possible.
        """

    def abandon(self) -> None:
        """Delete the temporary files; the target stays unchanged."""
        for file in self._files.values():
            file.abandon()
        if not self._keep:
            shutil.rmtree(self._partial, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abandon()
            return
        try:
            self.close()
        except BaseException:
            self.abandon()
            raise

    @property
    def _partial(self) -> Path:
        """The folder in which the files are written."""
        return partial_path(self.path)

    def _open_files(self, plan: Mapping[str, PlannedFile], *, reserve_bytes: int) -> None:
        remove_leftovers(self.path)
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

    @abstractmethod
    def _put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, on the CPU, to its files."""

    @abstractmethod
    def _complete(self) -> None:
        """Add the data that is known only when all tensors are written."""
