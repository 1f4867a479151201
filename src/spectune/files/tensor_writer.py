"""What all writers of checkpoints have in common: announced tensors, the weights hash, all files or none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from spectune.errors import some_of
from spectune.files.rename import with_file
from spectune.files.source import TensorInfo
from spectune.files.weights_hash import WeightsHasher


class TensorWriter(ABC):
    """Writes the tensors announced in `infos`, in any order, each once.

    The data goes to a temporary place beside the target. A clean exit with all tensors written gives it the
    target's name; any other exit deletes it. With `hold` the finished data waits for `commit`. `hash` is the
    weights hash of the tensors as they were passed, known after closing; without `hashed` there is none.
    """

    def __init__(
        self,
        path: Path,
        infos: Sequence[TensorInfo],
        *,
        metadata: Mapping[str, str] | None,
        hold: bool,
        hashed: bool = True,
    ) -> None:
        self.path = Path(path)
        self.metadata: dict[str, str] = dict(metadata or {})
        self._hold = hold
        self._infos = {info.name: info for info in infos}
        assert len(self._infos) == len(infos), "a tensor is announced twice"
        self._waiting = set(self._infos)
        self._hasher = WeightsHasher() if hashed else None
        self._hash: str | None = None
        self._keep = False  # set when finished files cannot be renamed: then they stay

    @property
    def hash(self) -> str:
        """The weights hash of the written tensors."""
        assert self._hash is not None, "the hash is known after closing"
        return self._hash

    @property
    def waiting(self) -> frozenset[str]:
        """The names of the tensors not written yet."""
        return frozenset(self._waiting)

    def differing(self, other: WeightsHasher) -> int:
        """Count the tensors that differ in any bit from those of `other`."""
        assert self._hasher is not None, "this file is written without a hash"
        return self._hasher.differing(other)

    def hash_ahead(self, name: str, tensor: Tensor) -> None:
        """Hash a tensor from any thread; `write` then does not hash it again."""
        if self._hasher is not None:
            self._hasher.add(name, tensor)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one announced tensor; dtype and shape must be as announced."""
        info = self._infos[name]
        assert name in self._waiting, f"{name} is written twice"
        assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape), (
            f"{name}: expected {info.dtype} {info.shape}, got {tensor.dtype} {tuple(tensor.shape)}"
        )
        tensor = tensor.detach().cpu()
        if self._hasher is not None and name not in self._hasher:
            self._hasher.add(name, tensor)
        self._put(name, tensor)
        self._waiting.remove(name)

    def close(self) -> None:
        """Finish the data and, unless it is held, give it the target's name."""
        if self._waiting:
            missing = sorted(self._waiting)
            raise AssertionError(
                f"{len(missing)} tensors of {self.path.name} were never written: {some_of(missing)}"
            )
        self._complete()
        if self._hasher is not None:
            self._hash = self._hasher.hexdigest()
        if not self._hold:
            self.commit()

    @abstractmethod
    def commit(self) -> None:
        """Give the finished data the target's name.

        Raises InputError, and keeps the temporary files, if that is not possible.
        """

    @abstractmethod
    def abandon(self) -> None:
        """Delete the temporary files; the target stays unchanged."""

    @abstractmethod
    def _put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that is on the CPU."""

    @abstractmethod
    def _complete(self) -> None:
        """Write what is known only after all tensors, and close the files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abandon()
            if isinstance(error, OSError):
                with_file(error, self.path)
            return
        try:
            self.close()
        except BaseException as failure:
            self.abandon()
            if isinstance(failure, OSError):
                with_file(failure, self.path)
            raise
