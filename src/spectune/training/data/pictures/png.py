"""The chunks of a PNG file."""

from __future__ import annotations

import os
from pathlib import Path

from spectune.training.data.pictures.tar_files import open_bytes

_TEXT = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
_MOST_CHUNKS = 100_000


def has_late_text(path: Path) -> bool:
    """Return whether text or EXIF data may follow the pixels of a PNG, where only a decoder finds it."""
    with open_bytes(path) as file:
        file.seek(8)
        is_late = False
        for _ in range(_MOST_CHUNKS):
            head = file.read(8)
            if len(head) < 8:
                return False
            if is_late and head[4:] in _TEXT:
                return True
            is_late = is_late or head[4:] == b"IDAT"
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    return True
