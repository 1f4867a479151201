"""Find files by their names in ComfyUI's lists, and choose paths of new files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import folder_paths

NONE = "none"
KINDS = ("checkpoints", "loras")
SUFFIX = ".safetensors"


def listed(kind: str) -> list[str]:
    """Return the safetensors files of a kind by their names in ComfyUI's lists."""
    return [name for name in folder_paths.get_filename_list(kind) if name.lower().endswith(SUFFIX)]


def listed_or_none(kind: str) -> list[str]:
    """Return `NONE`, then the files of a kind."""
    return [NONE, *listed(kind)]


def listed_of_both() -> list[str]:
    """Return LoRAs and checkpoints in one list, with their kind: `loras/style.safetensors`."""
    return [f"{kind}/{name}" for kind in reversed(KINDS) for name in listed(kind)]


def path_of(kind: str, name: str) -> Path:
    """Return the path of a listed file. Raises FileNotFoundError if it no longer exists."""
    return Path(folder_paths.get_full_path_or_raise(kind, name))


def optional_path(kind: str, name: str) -> Path | None:
    """Return the path of a listed file, or None for `NONE`."""
    return None if name in (NONE, "") else path_of(kind, name)


def path_of_both(word: str) -> Path:
    """Return the path of an entry of `listed_of_both`."""
    kind, _, name = word.partition("/")
    if kind not in KINDS:
        raise RuntimeError(
            f"{word!r} does not begin with checkpoints/ or loras/\nhint: choose an entry of the list"
        )
    return path_of(kind, name)


@dataclass(frozen=True)
class Target:
    """A file to write: its path and its name in ComfyUI's lists."""

    path: Path
    name: str


def target(kind: str, name: str, *, overwrite: bool) -> Target:
    """Return the target of a new file in the first folder of its kind, and create its parent folder.

    Raises:
        RuntimeError: The name points outside that folder, or the file exists and `overwrite` is off.
    """
    folder = Path(folder_paths.get_folder_paths(kind)[0]).absolute()
    name = name.strip().replace("\\", "/").strip("/")
    name = name if name.lower().endswith(SUFFIX) else name + SUFFIX
    path = Path(os.path.normpath(folder / name))
    if not path.is_relative_to(folder) or path.name == SUFFIX:
        raise RuntimeError(f"{name!r} is not a valid file name in {kind}\nhint: write NAME or FOLDER/NAME")
    if path.exists() and not overwrite:
        raise RuntimeError(
            f"{name} already exists in {kind}\nhint: turn overwrite on, or choose another name"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    return Target(path, str(path.relative_to(folder)))


def put(source: Path, path: Path) -> None:
    """Move a complete file to its path atomically, so that no partial file appears there."""
    partial = path.with_name(path.name + ".partial")
    try:
        shutil.move(source, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def stamp(find: Callable[[], Path | None]) -> str:
    """Return a key for ComfyUI's cache that changes with the file, or '' without a file."""
    try:
        path = find()
        state = None if path is None else path.stat()
    except OSError:
        return ""
    return "" if state is None else f"{state.st_mtime_ns}:{state.st_size}"
