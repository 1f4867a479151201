"""The user's configuration file: the folders in which models are searched by name.

model_folders = ["D:/ComfyUI", "E:/models/checkpoints", "D:/ComfyUI/extra_model_paths.yaml"]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from spectune.errors import InputError, did_you_mean, printable
from spectune.files.text import load_toml

KEY = "model_folders"
EXAMPLE = f'a line like {KEY} = ["D:/ComfyUI/models/checkpoints"]; write paths with /'
# Folders of checkpoints below the folder of ComfyUI, and of Forge and A1111.
PROGRAM_FOLDERS = ("models/checkpoints", "models/Stable-diffusion")
EXTRA_PATHS = "extra_model_paths.yaml"  # of ComfyUI, beside its `models`


@dataclass(frozen=True)
class ModelFolders:
    """The folders in which models are searched, and those that are listed but do not exist."""

    present: tuple[Path, ...]
    missing: tuple[Path, ...]


def config_path() -> Path:
    """Return the path of the configuration file, which need not exist."""
    import platformdirs  # not at the top: ComfyUI lacks it, and the nodes need no configuration file

    return Path(platformdirs.user_config_dir("spectune", appauthor=False)) / "config.toml"


def read_model_folders() -> ModelFolders:
    """Return the folders that the configuration file lists; none if there is no such file.

    Raises:
        InputError: The file, or a listed `extra_model_paths.yaml`, cannot be read.
    """
    path = config_path()
    # one folder may be listed twice, in two spellings
    expanded = {folder.resolve(): folder for entry in _entries(path) for folder in _expanded(entry)}
    folders = expanded.values()
    present = tuple(folder for folder in folders if folder.is_dir())
    return ModelFolders(present, tuple(folder for folder in folders if folder not in present))


def _entries(path: Path) -> list[Path]:
    if not path.is_file():
        return []
    try:
        values = load_toml(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {printable(str(error))}", hint=EXAMPLE) from error
    unknown = [key for key in values if key != KEY]
    if unknown:
        raise InputError(
            f"{path}: unknown key `{printable(unknown[0])}`{did_you_mean(unknown[0], [KEY])}", hint=EXAMPLE
        )
    listed: Any = values.get(KEY, [])
    if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in cast("list[Any]", listed)):
        raise InputError(f"{path}: `{KEY}` must be a list of folders", hint=EXAMPLE)
    # relative paths are relative to the file; `folder / entry` keeps absolute ones
    return [path.parent / Path(entry).expanduser() for entry in cast("list[str]", listed)]


def _expanded(entry: Path) -> Iterator[Path]:
    """Yield the folders of checkpoints of a folder, of a program, or of an extra_model_paths.yaml."""
    if entry.suffix.lower() in (".yaml", ".yml"):
        yield from _extra_folders(entry)
        return
    inside = [entry / name for name in PROGRAM_FOLDERS if (entry / name).is_dir()]
    yield from inside or [entry]
    if (entry / EXTRA_PATHS).is_file():
        yield from _extra_folders(entry / EXTRA_PATHS)


def _extra_folders(path: Path) -> Iterator[Path]:
    """Yield the folders of checkpoints in an extra_model_paths.yaml of ComfyUI."""
    try:
        programs: Any = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read: {printable(str(error))}",
            hint=f"correct it, or remove it from {config_path()}",
        ) from error
    sections = cast("dict[Any, Any]", programs).values() if isinstance(programs, dict) else ()
    for section in sections:
        if not isinstance(section, dict):
            continue
        values = cast("dict[str, Any]", section)
        base = path.parent / Path(str(values.get("base_path") or "")).expanduser()
        for line in str(values.get("checkpoints") or "").splitlines():
            if line.strip():
                yield base / line.strip()
