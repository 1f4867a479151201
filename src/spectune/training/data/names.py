"""A name for a run, from the folder of its pictures."""

from __future__ import annotations

import re
from pathlib import Path

# Folders whose names only say that they contain pictures.
GENERIC_NAMES = {"data", "dataset", "images", "img", "imgs", "pictures", "train", "training"}


def name_of(folder: Path) -> str:
    """Return a name for the run: that of the folder, without kohya's number of repeats.

    A folder with a generic name has the name of the nearest folder above it that has another one.
    """
    folder = folder.resolve()
    words = (re.sub(r"^\d+_", "", one.name) for one in (folder, *folder.parents))
    word = next((one for one in words if one.lower() not in GENERIC_NAMES), "")
    return re.sub(r"[^\w.-]+", "_", word)[:60].strip("._") or "style"
