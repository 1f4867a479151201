"""Writing a safetensors file tensor by tensor; it gets its final name only when it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from spectune.errors import InputError
from spectune.files.dtypes import SAFETENSORS_NAMES
from spectune.files.rename import partial_path, publish, remove_leftovers
from spectune.files.source import TensorInfo
from spectune.files.tensor_writer import TensorWriter
from spectune.files.text import storable
from spectune.files.weights_hash import tensor_bytes

RESERVE_BYTES = 16384  # room for metadata that is only known at the end (hashes)
_CHUNK_BYTES = 1 << 22


class StreamWriter(TensorWriter):
    """Writes one safetensors file.

    The header keeps a fixed size: it is written last, padded with spaces, so `metadata` may change until the
    file closes. The temporary file is beside the target.
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
        # The widest dtypes come first, as in the safetensors library: every tensor is aligned without gaps.
        order = sorted(infos, key=lambda info: -info.dtype.itemsize)
        super().__init__(path, order, metadata=metadata, hold=hold, hashed=hashed)
        self._begin = dict(_begins(order))
        self._header_bytes = _aligned(len(self._header()) + reserve_bytes)
        self._end = sum(info.nbytes for info in order)
        remove_leftovers(self.path)  # first: they take space, and an old folder may return
        check_target(self.path, self._header_bytes + self._end, force=force)
        self._force = force
        self._partial = partial_path(self.path)
        self._file = self._partial.open("w+b")

    def append(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that was not announced, after the announced ones; its entry uses the reserve."""
        assert name not in self._infos, f"{name} is announced already"
        self._infos[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape))
        self._begin[name] = self._end
        self._end += self._infos[name].nbytes
        self._waiting.add(name)
        self.write(name, tensor)

    def payload_sha256(self) -> str:
        """Return the sha256 of the bytes after the header, by which model databases index adapters.

        Call this after all tensors are written.
        """
        assert not self._waiting
        digest = hashlib.sha256()
        self._file.seek(8 + self._header_bytes)
        while chunk := self._file.read(_CHUNK_BYTES):
            digest.update(chunk)
        return digest.hexdigest()

    def legacy_sha256(self) -> str:
        """Return the sha256 of 64 KiB at 1 MiB, by which older web UIs recognize a model."""
        assert not self._waiting
        self._file.seek(0x100000)
        return hashlib.sha256(self._file.read(0x10000)).hexdigest()

    def _put(self, name: str, tensor: Tensor) -> None:
        self._file.seek(8 + self._header_bytes + self._begin[name])
        self._file.write(tensor_bytes(tensor))

    def _complete(self) -> None:
        header = self._header()
        assert len(header) <= self._header_bytes, (
            f"metadata grew by more than the reserve of {self.path.name}"
        )
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(8, "little") + header.ljust(self._header_bytes))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def commit(self) -> None:
        try:
            publish(self._partial, self.path, force=self._force)
        except OSError as error:
            self._keep = True
            raise InputError(
                f"cannot rename the finished file to {self.path}: {error.strerror}",
                hint=f"rename {self._partial} yourself; it is complete",
            ) from error

    def abandon(self) -> None:
        with suppress(OSError):  # closing writes the last bytes, and the disk may be full
            self._file.close()
        if not self._keep:
            self._partial.unlink(missing_ok=True)

    def _header(self) -> bytes:
        # a file name on Linux need not be Unicode, but readers of safetensors accept nothing else
        metadata = {storable(key): storable(value) for key, value in self.metadata.items()}
        header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
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
    """Raise InputError if the target exists, its folder does not, or the disk is too full."""
    if path.exists() and not force:
        raise InputError(f"{path} exists", hint="pass `force` to overwrite it, or choose another `out`")
    if path.is_dir():
        raise InputError(f"{path} is a folder: expected a file name")
    if not path.parent.is_dir():
        raise InputError(
            f"cannot write {path.name}: there is no folder {path.parent}", hint="create the folder first"
        )
    free = shutil.disk_usage(path.parent).free
    if nbytes > free:
        raise InputError(
            f"{path.name} needs {nbytes / 1e6:,.1f} MB: {path.parent} has {free / 1e6:,.1f} MB free"
        )


def refuse_inputs(target: Path, inputs: Iterable[Path]) -> None:
    """Raise InputError if the target is one of the input files, even if overwriting is allowed."""
    for path in inputs if target.exists() else ():
        inside = target.is_dir() and path.resolve().is_relative_to(target.resolve())
        if inside or target.samefile(path):
            raise InputError(
                f"{target} is {'the folder of ' if inside else ''}one of the input files",
                hint="choose another `out`",
            )


def _begins(order: Sequence[TensorInfo]) -> Iterator[tuple[str, int]]:
    position = 0
    for info in order:
        yield info.name, position
        position += info.nbytes


def _aligned(count: int, unit: int = 64) -> int:
    return (count + 8 + unit - 1) // unit * unit - 8  # the data begins at a multiple of `unit` bytes
