"""Files by the names that ComfyUI's lists show, and where new ones go."""

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
    """The safetensors files of a kind, as ComfyUI's lists name them."""
    return [name for name in folder_paths.get_filename_list(kind) if name.lower().endswith(SUFFIX)]


def listed_or_none(kind: str) -> list[str]:
    """The same behind the word for no file."""
    return [NONE, *listed(kind)]


def listed_of_both() -> list[str]:
    """Checkpoints and LoRAs in one list, each behind its kind: `loras/style.safetensors`."""
    return [f"{kind}/{name}" for kind in reversed(KINDS) for name in listed(kind)]


def path_of(kind: str, name: str) -> Path:
    """The file of a name in a list; raises FileNotFoundError when it is gone."""
    return Path(folder_paths.get_full_path_or_raise(kind, name))


def optional_path(kind: str, name: str) -> Path | None:
    """The file of a name in a list, None for the word for no file."""
    return None if name in (NONE, "") else path_of(kind, name)


def path_of_both(word: str) -> Path:
    """The file of a name in the list of both kinds."""
    kind, _, name = word.partition("/")
    if kind not in KINDS:
        raise RuntimeError(f"{word!r} names no kind of file\nhint: write checkpoints/NAME or loras/NAME")
    return path_of(kind, name)


@dataclass(frozen=True)
class Target:
    """A file to be written: its path, and the name by which ComfyUI's lists will show it."""

    path: Path
    name: str


def target(kind: str, name: str, *, overwrite: bool) -> Target:
    """Where a new file of a kind goes: into the first folder of its kind, which the lists show.

    Raises RuntimeError for a name that leads out of that folder, and for a file that exists unless
    `overwrite` is on.
    """
    folder = Path(folder_paths.get_folder_paths(kind)[0]).absolute()
    name = name.strip().replace("\\", "/").strip("/")
    name = name if name.lower().endswith(SUFFIX) else name + SUFFIX
    path = Path(os.path.normpath(folder / name))
    if not path.is_relative_to(folder) or path.name == SUFFIX:
        raise RuntimeError(
            f"{name!r} is no name for a file in {kind}\nhint: write FOLDER/NAME, or NAME alone"
        )
    if path.exists() and not overwrite:
        raise RuntimeError(
            f"{name} is there already, in {kind}\nhint: turn overwrite on, or take another name"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    return Target(path, str(path.relative_to(folder)))


def put(made: Path, path: Path) -> None:
    """Move a complete file to its place, where it appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        shutil.move(made, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def stamp(find: Callable[[], Path | None]) -> str:
    """What changes when a file does, for ComfyUI's cache; empty where there is none yet."""
    try:
        path = find()
        state = None if path is None else path.stat()
    except OSError:
        return ""
    return "" if state is None else f"{state.st_mtime_ns}:{state.st_size}"
