"""A safetensors file written tensor by tensor, renamed to its final name only when complete."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from torch import Tensor

from spectune.errors import InputError, some_of
from spectune.files.dtypes import SAFETENSORS_NAMES
from spectune.files.source import TensorInfo
from spectune.files.weights_hash import WeightsHasher, tensor_bytes

RESERVE_BYTES = 16384  # room for metadata that is only known at the end (hashes)
_CHUNK_BYTES = 1 << 22
_PARTIAL = ".partial"


class StreamWriter:
    """Writes the tensors announced in `infos`, in any order, each once.

    The header keeps a fixed size: it is written last, padded with spaces, so `metadata` may change until the
    file closes. The data goes to a temporary file beside the target, which takes the target's name on a clean
    exit with all tensors written and disappears otherwise; only a finished file that cannot be renamed stays,
    and the error names it. With `hold` the finished file waits under its temporary name for `commit`.
    `hash` is the weights hash, known after closing; without `hashed` there is none.
    Raises InputError before any work if the target exists and `force` is not set, or the disk is too full.
    """

    def __init__(
        self,
        path: Path,
        infos: Sequence[TensorInfo],
        *,
        metadata: Mapping[str, str] | None = None,
        reserve_bytes: int = RESERVE_BYTES,
        force: bool = False,
        hold: bool = False,
        hashed: bool = True,
    ) -> None:
        self.path = Path(path)
        self._hold = hold
        self.metadata: dict[str, str] = dict(metadata or {})
        # widest types first, as the safetensors library does: every tensor is aligned without gaps
        order = sorted(infos, key=lambda info: -info.dtype.itemsize)
        self._infos = {info.name: info for info in order}
        assert len(self._infos) == len(order), "a tensor is announced twice"
        self._begin = dict(_begins(order))
        self._waiting = set(self._infos)
        self._hasher = WeightsHasher() if hashed else None
        self._hash: str | None = None
        self._header_bytes = _aligned(len(self._header()) + reserve_bytes)
        self._data_bytes = sum(info.nbytes for info in order)
        check_target(self.path, self._header_bytes + self._data_bytes, force=force)
        self._keep = False
        self._end = self._data_bytes
        remove_leftovers(self.path)
        self._partial = partial_path(self.path)
        self._file = self._partial.open("w+b")

    @property
    def hash(self) -> str:
        """The weights hash of the written tensors."""
        assert self._hash is not None, "the hash is known when the file is closed"
        return self._hash

    def differing(self, other: WeightsHasher) -> int:
        """Count the tensors that differ in any bit from those of `other`."""
        assert self._hasher is not None, "this file is written without a hash"
        return self._hasher.differing(other)

    def hash_ahead(self, name: str, tensor: Tensor) -> None:
        """Hash a tensor from any thread; `write` then does not hash it again."""
        if self._hasher is not None:
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
        if self._hasher is not None and name not in self._hasher:
            self._hasher.add(name, tensor)
        self._file.seek(8 + self._header_bytes + self._begin[name])
        self._file.write(tensor_bytes(tensor))
        self._waiting.remove(name)

    def append(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that was not announced, after all that were; the reserve has room for its entry."""
        assert name not in self._infos, f"{name} is announced already"
        self._infos[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape))
        self._begin[name] = self._end
        self._end += self._infos[name].nbytes
        self._waiting.add(name)
        self.write(name, tensor)

    def payload_sha256(self) -> str:
        """sha256 of the bytes after the header, as model databases index adapters; all tensors written."""
        assert not self._waiting
        digest = hashlib.sha256()
        self._file.seek(8 + self._header_bytes)
        while chunk := self._file.read(_CHUNK_BYTES):
            digest.update(chunk)
        return digest.hexdigest()

    def legacy_sha256(self) -> str:
        """sha256 of 64 KiB at 1 MiB, by which older web UIs recognise a model."""
        assert not self._waiting
        self._file.seek(0x100000)
        return hashlib.sha256(self._file.read(0x10000)).hexdigest()

    def close(self) -> None:
        """Finish the file and, unless it is held, give it its name."""
        if self._waiting:
            missing = sorted(self._waiting)
            raise AssertionError(
                f"{len(missing)} tensors of {self.path.name} were never written: {some_of(missing)}"
            )
        header = self._header()
        assert len(header) <= self._header_bytes, (
            f"metadata grew by more than the reserve of {self.path.name}"
        )
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(8, "little") + header.ljust(self._header_bytes))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._hasher is not None:
            self._hash = self._hasher.hexdigest()
        if not self._hold:
            self.commit()

    def commit(self) -> None:
        """Give the finished file its name."""
        try:
            self._partial.replace(self.path)
        except OSError as error:
            self._keep = True
            raise InputError(
                f"cannot name the finished file {self.path}: {error.strerror}",
                hint=f"nothing is lost: rename {self._partial} yourself",
            ) from error

    def abandon(self) -> None:
        """Delete the temporary file; the target stays unchanged."""
        self._file.close()
        if not self._keep:
            self._partial.unlink(missing_ok=True)

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

    def _header(self) -> bytes:
        header: dict[str, object] = {"__metadata__": self.metadata} if self.metadata else {}
        for name, info in self._infos.items():
            begin = self._begin[name]
            header[name] = {
                "dtype": SAFETENSORS_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [begin, begin + info.nbytes],
            }
        return json.dumps(header, separators=(",", ":")).encode()


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> str:
    """Write tensors that are already in memory and return their weights hash."""
    infos = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with StreamWriter(path, infos, metadata=metadata, reserve_bytes=0, force=force) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return writer.hash


def check_target(path: Path, nbytes: int, *, force: bool) -> None:
    """Refuse, before work begins, a target that exists, has no folder, or does not fit on the disk."""
    if path.exists() and not force:
        raise InputError(f"{path} exists", hint="pass --force to overwrite it, or -o for another name")
    if path.is_dir():
        raise InputError(f"{path} is a folder: expected a file name")
    if not path.parent.is_dir():
        raise InputError(
            f"cannot write {path.name}: there is no folder {path.parent}", hint="create the folder first"
        )
    free = shutil.disk_usage(path.parent).free
    if nbytes > free:
        raise InputError(
            f"{path.name} needs {nbytes / 1e9:.2f} GB: {path.parent} has {free / 1e9:.2f} GB free"
        )


def partial_path(path: Path) -> Path:
    """Return the temporary name of a file that this process writes."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}{_PARTIAL}")


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of `path` that processes of this machine left when they were killed."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{_host()}-(\d+){re.escape(_PARTIAL)}")
    for leftover in path.parent.glob(f".*{_PARTIAL}"):
        match = pattern.fullmatch(leftover.name)
        if match is None or psutil.pid_exists(int(match[1])):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _host() -> str:
    """Return the name of this machine for a file name, since several machines may share a folder."""
    return re.sub(r"[^A-Za-z0-9]", "", platform.node())[:32] or "local"


def refuse_inputs(target: Path, inputs: Iterable[Path]) -> None:
    """Raise InputError, even where overwriting is allowed, when the target is a file that is being read."""
    for path in inputs if target.exists() else ():
        inside = target.is_dir() and path.resolve().is_relative_to(target.resolve())
        if inside or target.samefile(path):
            raise InputError(
                f"{target} is {'the folder of ' if inside else ''}one of the files that are read",
                hint="pass -o for another name",
            )


def _begins(order: Sequence[TensorInfo]) -> Iterator[tuple[str, int]]:
    position = 0
    for info in order:
        yield info.name, position
        position += info.nbytes


def _aligned(count: int, unit: int = 64) -> int:
    return (count + 8 + unit - 1) // unit * unit - 8  # the data begins at a multiple of `unit` bytes
