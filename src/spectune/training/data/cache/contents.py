"""The contents of picture files as hashes. A file that has not changed is not read again."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from spectune.errors import InputError
from spectune.files.reader import SafetensorsFile
from spectune.files.writer import write_tensors
from spectune.training.data.cache.keys import KEY_BYTES, Keys, RowsByKey, key_of
from spectune.training.data.pictures.tar_files import file_of, open_bytes

_SAVED_AT_ONCE = 65_536  # pictures in one file; an interruption loses at most so many hashes
_SETTLED_SECONDS = 2.0  # FAT stores times in steps of 2 s: a later change within a step would be missed


class ContentHashes:
    """The hashes of picture files in a folder, by the stamps of the files."""

    def __init__(self, folder: Path) -> None:
        """Read the hashes that earlier runs saved in a folder. Damaged files are listed in `damaged`."""
        self.damaged: list[Path] = []
        self._folder = folder
        rows = [_empty(), *(self._read(path) for path in sorted(folder.glob("pictures-*.safetensors")))]
        saved = np.concatenate(rows)
        self._table, self._hashes = RowsByKey(saved[:, :KEY_BYTES]), saved[:, KEY_BYTES:]
        self._new: list[NDArray[np.uint8]] = []

    def find(self, stamps: Keys) -> tuple[Keys, NDArray[np.bool_]]:
        """Return the hashes of files, (files, 16), and which of them are known."""
        rows = self._table.find(stamps)
        hashes = np.zeros_like(stamps)
        known = rows >= 0
        hashes[known] = self._hashes[rows[known]]
        return hashes, known

    def add(self, stamps: Keys, hashes: Keys) -> None:
        """Remember the hashes of files."""
        self._new.append(np.concatenate([stamps, hashes], axis=1))
        if sum(map(len, self._new)) >= _SAVED_AT_ONCE:
            self.save()

    def save(self) -> None:
        """Write the new hashes to a file of their own, so that several runs may do so at the same time."""
        rows = np.concatenate([_empty(), *self._new])
        self._new = []
        if len(rows):
            path = self._folder / f"pictures-{uuid.uuid4().hex}.safetensors"
            write_tensors(path, {"pictures": torch.from_numpy(rows)})

    def _read(self, path: Path) -> NDArray[np.uint8]:
        try:
            file = SafetensorsFile(path)
            try:
                rows = file.load("pictures").numpy()
            finally:
                file.close()
            if rows.dtype == np.uint8 and rows.ndim == 2 and rows.shape[1] == 2 * KEY_BYTES:
                return rows
        except (InputError, KeyError):
            pass
        self.damaged.append(path)
        return _empty()


def stamp_of(path: Path) -> tuple[bytes, bool]:
    """Return a key of a file's path, size and time of the last change, and whether the key is reliable.

    It is not if the file was changed a moment ago: it may change again within the same time stamp.

    Raises:
        InputError: The file is missing.
    """
    try:
        status = file_of(path).stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    stamp = key_of(f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}")
    return stamp, status.st_mtime < time.time() - _SETTLED_SECONDS


def hash_files(paths: Sequence[Path]) -> bytes:
    """Return the first 16 bytes of the sha256 of each file, one after the other.

    Raises:
        InputError: A file cannot be read.
    """
    digests: list[bytes] = []
    for path in paths:
        try:
            with open_bytes(path) as file:
                digests.append(hashlib.file_digest(file, "sha256").digest()[:KEY_BYTES])
        except OSError as error:
            raise _unreadable(path, error) from error
    return b"".join(digests)


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot read {path}: {error.strerror}", hint="restore the file, and run the same command again"
    )


def _empty() -> NDArray[np.uint8]:
    return np.empty((0, 2 * KEY_BYTES), dtype=np.uint8)
