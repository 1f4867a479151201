"""Look for checkpoints, pictures and other files in the user's folders. This module does not import torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

DEEPEST = 4  # folders below a configured one
MOST_FILES = 20_000  # entries that are looked at in one search
MOST_CHECKPOINTS, MOST_FOLDERS = 200, 200
LARGEST_HEADER = 50_000_000  # bytes; SDXL has about 300,000
_UNET = "model.diffusion_model."
_ENCODERS = "conditioner.embedders."


@dataclass(frozen=True)
class FoundCheckpoint:
    """A file or folder that can be trained."""

    path: str
    name: str
    kind: str
    nbytes: int
    modified: float  # seconds since 1970


@dataclass(frozen=True)
class FoundFolder:
    """A folder with pictures in it, or in its `N_name` folders."""

    path: str
    name: str
    pictures: int
    modified: float


def checkpoints(roots: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the checkpoints below the folders, the newest first."""
    found: dict[str, FoundCheckpoint] = {}
    for entry in _entries(roots):
        if entry.name.lower().endswith(".safetensors") or entry.name == "model_index.json":
            one = _checkpoint(entry)
            if one is not None:
                found.setdefault(one.path, one)
    newest = sorted(found.values(), key=lambda one: (-one.modified, one.name))
    return [asdict(one) for one in newest[:MOST_CHECKPOINTS]]


def picture_folders(roots: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the folders with pictures below the folders, the newest first.

    A parent of `N_name` folders stands for them.
    """
    from spectune.training.data.pictures.formats import is_picture  # imports PIL

    counts: dict[Path, tuple[int, float]] = {}
    for entry in _entries(roots):
        if is_picture(Path(entry.name)):
            folder = Path(entry.path).parent
            repeats, _, rest = folder.name.partition("_")
            if repeats.isdecimal() and rest and folder not in roots:
                folder = folder.parent
            pictures, modified = counts.get(folder, (0, 0.0))
            counts[folder] = (pictures + 1, max(modified, _modified(entry)))
    newest = sorted(counts.items(), key=lambda row: (-row[1][1], str(row[0])))[:MOST_FOLDERS]
    return [
        asdict(FoundFolder(str(path), path.name, pictures, modified)) for path, (pictures, modified) in newest
    ]


def files_ending_in(suffix: str, roots: Sequence[Path]) -> list[Path]:
    """Return the files below the folders that have a suffix, the newest first, each once."""
    found = {entry.path: _modified(entry) for entry in _entries(roots) if entry.name.lower().endswith(suffix)}
    return [Path(path) for path in sorted(found, key=lambda path: (-found[path], path))]


def free_name(wanted: str, folder: Path) -> str:
    """Return `wanted`, or `wanted-2` and so on: a name of a tune that has no files in the folder."""
    names = (wanted if number == 1 else f"{wanted}-{number}" for number in range(1, 10_000))
    return next(name for name in names if not is_taken(name, folder))


def is_taken(name: str, folder: Path) -> bool:
    """Return whether there are files of a tune of this name."""
    return (folder / f"{name}.toml").exists() or (folder / "runs" / name).exists()


def _entries(roots: Sequence[Path]) -> Iterator[os.DirEntry[str]]:
    """Yield the files below the folders. Hidden folders and links to folders are left out."""
    waiting = [(root, 0) for root in roots]
    seen = 0
    while waiting:
        folder, depth = waiting.pop(0)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:  # Settings shows folders that cannot be read
            continue
        for entry in entries:
            seen += 1
            if seen > MOST_FILES:
                return
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                if depth < DEEPEST:
                    waiting.append((Path(entry.path), depth + 1))
            elif entry.is_file(follow_symlinks=False):
                yield entry


def _modified(entry: os.DirEntry[str]) -> float:
    return entry.stat(follow_symlinks=False).st_mtime


def _checkpoint(entry: os.DirEntry[str]) -> FoundCheckpoint | None:
    status = entry.stat(follow_symlinks=False)
    if entry.name == "model_index.json":
        folder = Path(entry.path).parent
        if not (folder / "unet").is_dir():
            return None
        nbytes = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
        return FoundCheckpoint(str(folder), folder.name, "diffusers folder", nbytes, status.st_mtime)
    kind = _kind_of_file(entry.path, status.st_size, status.st_mtime)
    if not kind:
        return None
    return FoundCheckpoint(entry.path, entry.name, kind, status.st_size, status.st_mtime)


@lru_cache(maxsize=4096)
def _kind_of_file(path: str, nbytes: int, modified: float) -> str:
    """Return what a .safetensors file is, or an empty text if it is no checkpoint of SDXL's kind."""
    try:
        with Path(path).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(LARGEST_HEADER, nbytes):
                return ""
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError):
        return ""
    keys = header if isinstance(header, dict) else {}
    if not any(key.startswith(_UNET) for key in keys) or f"{_UNET}label_emb.0.0.weight" not in keys:
        return ""
    encoders = {key.split(".")[2] for key in keys if key.startswith(_ENCODERS)}
    metadata = keys.get("__metadata__") or {}
    if isinstance(metadata, dict) and str(metadata.get("spectune.role", "")).startswith("residual"):
        return ""  # the residual of a split; the original is trained
    return "SDXL checkpoint" if len(encoders) >= 2 else "SDXL, UNet only"
