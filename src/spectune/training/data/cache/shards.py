"""A shard: one safetensors file with the posteriors of many views of one size.

It has two tensors: `posteriors`, bfloat16 (rows, 2 * channels, h, w), with the mean and the standard
deviation of scaled latents; and `rows`, uint8 (rows, 20), with the key of each view and the CRC-32 of its
posterior.
"""

from __future__ import annotations

import json
import os
import time
import uuid
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectune.errors import InputError
from spectune.files.reader import SafetensorsFile
from spectune.files.rename import partial_path, remove_leftovers_of, rename
from spectune.files.weights_hash import tensor_bytes
from spectune.training.data.cache.keys import KEY_BYTES, Keys

SHARD_BYTES = 2_600_000_000  # 10,000 pictures of 1024 px with 4 channels
_HEADER_BYTES = 4096
_CRC_BYTES = 4
NO_KEY = bytes(KEY_BYTES)  # of a row whose posterior is damaged


@dataclass(frozen=True)
class Shard:
    """A file of posteriors. It is opened for each read: nothing holds it open, and workers can share it."""

    path: Path
    shape: tuple[int, int, int]  # of a posterior: 2 * channels, h, w
    posteriors_at: int  # position in the file in bytes
    rows_at: int

    def read(self, row: int, crc: int) -> Tensor | None:
        """Return a posterior, bfloat16 (2 * channels, h, w), or None if its bytes do not have the CRC-32.

        Raises:
            OSError: The file cannot be read.
        """
        nbytes = posterior_bytes(self.shape)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.posteriors_at + row * nbytes)
            data = bytearray(file.read(nbytes))
        if len(data) != nbytes or zlib.crc32(data) != crc:
            return None
        return torch.frombuffer(data, dtype=torch.bfloat16).view(self.shape)

    def forget(self, row: int) -> None:
        """Remove the key of a damaged row from the file, so that the next run encodes its view again.

        Raises:
            OSError: The file cannot be written.
        """
        with self.path.open("rb+", buffering=0) as file:
            file.seek(self.rows_at + row * (KEY_BYTES + _CRC_BYTES))
            file.write(NO_KEY)


@dataclass(frozen=True)
class ShardRows:
    """The keys (rows, 16) of a shard, and the CRC-32 of each posterior, uint32 (rows,)."""

    keys: Keys
    crcs: NDArray[np.uint32]


def open_shard(path: Path, metadata: Mapping[str, str]) -> tuple[Shard, ShardRows]:
    """Read the header and the keys of a shard, not its posteriors.

    Raises:
        InputError: The file is damaged, or its metadata is not `metadata`.
    """
    file = SafetensorsFile(path)
    try:
        infos = file.tensors
        if file.metadata != metadata or infos.keys() != {"posteriors", "rows"}:
            raise InputError(f"{path.name} is not a shard of this cache")
        count, *shape = infos["posteriors"].shape
        kinds = infos["posteriors"].dtype, infos["rows"].dtype, infos["rows"].shape
        if len(shape) != 3 or kinds != (torch.bfloat16, torch.uint8, (count, KEY_BYTES + _CRC_BYTES)):
            raise InputError(f"{path.name} has tensors of other shapes than a shard")
        rows = file.load("rows").numpy()
        shard = Shard(
            path, (shape[0], shape[1], shape[2]), file.offset_of("posteriors"), file.offset_of("rows")
        )
    finally:
        file.close()
    crcs = np.ascontiguousarray(rows[:, KEY_BYTES:]).view("<u4")[:, 0]
    return shard, ShardRows(rows[:, :KEY_BYTES], crcs.astype(np.uint32))


def posterior_bytes(shape: tuple[int, int, int]) -> int:
    """Return the bytes of a posterior on disk, which are those of its latents in float32."""
    return 2 * shape[0] * shape[1] * shape[2]


class ShardWriter:
    """Writes posteriors of one size to shards in a folder, one after the other; a context manager.

    A shard gets its name when it is complete. An error or a stop completes the shard that is being written; a
    killed process loses only that one. The names begin with the time, so that they sort by age.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], metadata: Mapping[str, str]) -> None:
        self._folder, self._shape, self._metadata = folder, shape, metadata
        self._partial = partial_path(folder / "shard.safetensors")
        self._file: BinaryIO | None = None
        self._rows = bytearray()
        self._most_rows = max(1, SHARD_BYTES // posterior_bytes(shape))

    def add(self, key: bytes, posterior: Tensor) -> None:
        """Write the posterior of a view, bfloat16 (2 * channels, h, w).

        Raises:
            InputError: The disk is full or cannot be written.
        """
        data = tensor_bytes(posterior)
        assert tuple(posterior.shape) == self._shape
        assert posterior.dtype == torch.bfloat16
        try:
            if self._file is None:
                remove_leftovers_of(self._folder, r"shard\.safetensors")
                self._file = self._partial.open("wb")
                self._file.seek(_HEADER_BYTES)
            self._file.write(data)
            self._rows += key + zlib.crc32(data).to_bytes(_CRC_BYTES, "little")
            if self._count == self._most_rows:
                self._finish(self._file)
        except OSError as error:
            raise self._refused(error) from error

    @property
    def _count(self) -> int:
        return len(self._rows) // (KEY_BYTES + _CRC_BYTES)

    def _finish(self, file: BinaryIO) -> None:
        """Complete the current shard and give it a name that no other process uses."""
        end = self._count * posterior_bytes(self._shape)
        file.seek(_HEADER_BYTES + end)  # over an interrupted row
        file.write(self._rows)
        file.truncate()
        file.seek(0)
        file.write(self._header(end))
        file.flush()
        os.fsync(file.fileno())
        file.close()
        name = f"{time.time_ns():016x}-{uuid.uuid4().hex[:16]}.safetensors"
        rename(self._partial, self._folder / name)
        self._file, self._rows = None, bytearray()

    def _header(self, end: int) -> bytes:
        header = {
            "__metadata__": dict(self._metadata),
            "posteriors": {"dtype": "BF16", "shape": [self._count, *self._shape], "data_offsets": [0, end]},
            "rows": {
                "dtype": "U8",
                "shape": [self._count, KEY_BYTES + _CRC_BYTES],
                "data_offsets": [end, end + len(self._rows)],
            },
        }
        length = _HEADER_BYTES - 8
        return length.to_bytes(8, "little") + json.dumps(header).encode().ljust(length)

    def _refused(self, error: OSError) -> InputError:
        return InputError(
            f"cannot write to the latent cache {self._folder}: {error.strerror}",
            hint="free some space, or set data.cache_folder to another disk; complete files are kept",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        try:
            if self._count and not self._file.closed:
                self._finish(self._file)
        except OSError as failed:
            if error is None:
                raise self._refused(failed) from failed
        finally:
            if self._file is not None:
                with suppress(OSError):  # closing writes the last bytes, and the disk may be full
                    self._file.close()
                self._partial.unlink(missing_ok=True)
