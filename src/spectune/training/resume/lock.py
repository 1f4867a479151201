"""A lock on the files of a run, so that two trainings do not overwrite and remove each other's saves."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from spectune.errors import InputError, printable
from spectune.files.rename import made_folder
from spectune.files.text import load_json


@contextmanager
def locked_output(output: Path, name: str, warn: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of the run `name` in its output folder, which is created if it is missing.

    The system releases the lock of a process that ends in any way. A file beside the lock tells who holds it.

    Raises:
        InputError: Another process trains a run of this name into this folder.
    """
    with made_folder(output), _locked(output, name, warn):  # an error before any work leaves no empty folder
        yield


@contextmanager
def _locked(output: Path, name: str, warn: Callable[[str], None]) -> Iterator[None]:
    lock, owner = output / f".{name}.lock", output / f".{name}.owner.json"
    held = FileLock(lock, timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise InputError(
            f"another training writes to {output}: {_described(owner)}",
            hint="wait until it ends, or set another run.name or run.output",
        ) from None
    except NotImplementedError:
        warn(f"the disk of {output} has no file locks: start no other training of the run {name} there")
    try:
        if owner.exists():
            warn(f"the lock of {_described(owner)} was taken over: that process ended without removing it")
        owner.write_text(json.dumps(_this_process()), encoding="utf-8")
        yield
    finally:
        _release(held, lock, owner)


def _release(held: FileLock, lock: Path, owner: Path) -> None:
    if held.is_locked:
        for file in (owner, lock):
            with suppress(OSError):  # Windows removes the lock file when it is released
                file.unlink()
        held.release()


def _this_process() -> dict[str, Any]:
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": started}


def _described(owner: Path) -> str:
    try:
        content: Any = load_json(owner.read_text(encoding="utf-8"))
        return printable(f"process {content['pid']} on {content['host']}, started {content['started']}")
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that is not recorded"
