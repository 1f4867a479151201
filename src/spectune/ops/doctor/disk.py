"""The disk of a folder: its free space, and its speed measured with a temporary file."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from spectune.errors import printable

FILE_BYTES = 64 * 2**20
_BLOCK_BYTES = 4 * 2**20
_MAC_NO_CACHE = 48  # F_NOCACHE of fcntl on macOS


@dataclass(frozen=True)
class Disk:
    """The disk that holds a folder. Speeds are in bytes per second, None where nothing was measured."""

    folder: Path
    free_bytes: int
    total_bytes: int
    write_speed: float | None = None
    read_speed: float | None = None  # None also on Windows, which answers from memory
    failure: str = ""  # why nothing was measured


def measure_disk(folder: Path) -> Disk:
    """Return the space of a folder's disk and the speed of one sequential file, which is removed again."""
    usage = shutil.disk_usage(folder)
    disk = Disk(folder.resolve(), usage.free, usage.total)
    if usage.free < 4 * FILE_BYTES:
        return replace(disk, failure="too little free space")
    try:
        write, read = _speeds(folder)
    except OSError as error:
        return replace(disk, failure=printable(error.strerror or str(error)))
    return replace(disk, write_speed=write, read_speed=read)


def _speeds(folder: Path) -> tuple[float, float | None]:
    block = os.urandom(_BLOCK_BYTES)  # some disks compress zeros
    handle, name = tempfile.mkstemp(prefix="spectune-doctor-", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:
            started = time.perf_counter()
            for _ in range(FILE_BYTES // _BLOCK_BYTES):
                file.write(block)
            os.fsync(file.fileno())
            write = FILE_BYTES / max(time.perf_counter() - started, 1e-6)
        with Path(name).open("rb", buffering=0) as file:
            if not _bypass_cache(file.fileno()):
                return write, None
            started = time.perf_counter()
            while file.read(_BLOCK_BYTES):
                pass
            return write, FILE_BYTES / max(time.perf_counter() - started, 1e-6)
    finally:
        with suppress(OSError):
            Path(name).unlink()


def _bypass_cache(file: int) -> bool:
    """Make the system read a file from the disk. Return False where that is not possible."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        return True
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    fcntl.fcntl(file, _MAC_NO_CACHE, 1)
    return True
