"""Rename files on systems where other programs open them."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

_TRIES, _PAUSE_SECONDS = 6, 0.3


@contextmanager
def replacing(target: Path) -> Generator[Path]:
    """Give a path to write to, which becomes `target` after the block. A crash leaves the old file."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        rename(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def rename(source: Path, target: Path) -> None:
    """Give `source` the name of `target` and replace a file that has it.

    Virus scanners and indexers on Windows open new files for a moment, and a rename is refused meanwhile. Try
    again for about two seconds. Raises OSError if it is still refused.
    """
    for attempt in range(1, _TRIES + 1):
        try:
            source.replace(target)
            return
        except PermissionError:
            if attempt == _TRIES:
                raise
            time.sleep(_PAUSE_SECONDS)
