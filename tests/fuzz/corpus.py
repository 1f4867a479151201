"""Findings as small files in the repository: they are made smaller, saved, and tried again by the tests."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
LARGEST = 16_384  # bytes of one saved input
LARGEST_TOTAL = 1_000_000


def saved_inputs(name: str) -> Iterator[Path]:
    """Yield the saved inputs of a target."""
    yield from sorted((CORPUS / name).glob("*.bin"))


def save(name: str, kind: str, data: bytes, corpus: Path = CORPUS) -> Path | None:
    """Save an input that caused a finding. Return None if it is too large to be kept."""
    if len(data) > LARGEST:
        return None
    words = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")[:50]
    path = corpus / name / f"{words}-{hashlib.sha256(data).hexdigest()[:8]}.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def smaller(data: bytes, is_same: Callable[[bytes], bool], *, tries: int = 300) -> bytes:
    """Remove pieces of `data` as long as `is_same` holds, with at most `tries` calls of it."""
    size = max(1, len(data) // 2)
    while tries > 0:
        place, changed = 0, False
        while place < len(data) and tries > 0:
            candidate = data[:place] + data[place + size :]
            tries -= 1
            if is_same(candidate):
                data, changed = candidate, True
            else:
                place += size
        if size == 1 and not changed:
            break
        size = max(1, size // 2)
    return data
