"""Find a model by its name in the folders of the configuration file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath

from spectune.errors import InputError, counted, did_you_mean, printable, some_of
from spectune.files.model_folders import hub
from spectune.files.model_folders.config import config_path, read_model_folders

_WEIGHTS = ".safetensors"
_INDEX = ".safetensors.index.json"
_MODEL_INDEX = "model_index.json"  # marks a diffusers folder


def find_model(path: Path, notify: Callable[[str], None] | None = None) -> Path:
    """Return an existing path unchanged, and for a name the only model of that name.

    A name is the name of a file without or with its extension, or its path below the folder:
    `pony`, `pony.safetensors`, `sdxl/pony`. Only files in the folders can match. A path that is neither is
    returned unchanged, and opening it says that it does not exist. `hub:owner/name` is downloaded.

    Raises:
        InputError: Several models match, or the configuration file is wrong.
    """
    word = path.as_posix().replace("\\", "/")
    if word.startswith(hub.PREFIX):
        return hub.download(word, notify)
    if path.exists() or path.is_absolute() or ".." in path.parts:
        return path
    folders = read_model_folders()
    if not folders.present and not folders.missing:
        return path
    models = [(folder, model) for folder in folders.present for model in models_in(folder)]
    matches = (model for folder, model in models if word.lower() in names_of(model, folder))
    found = list({model.resolve(): model for model in matches}.values())
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"{word} is the name of {counted(len(found), 'model')}: {', '.join(map(str, found))}",
            hint="pass the path of one of them",
        )
    known = {name for folder, model in models for name in names_of(model, folder)}
    missing = some_of([str(folder) for folder in folders.missing])
    raise InputError(
        f"{printable(word)} does not exist, and {counted(len(folders.present), 'model folder')} "
        f"of {config_path()} contain no model of this name{did_you_mean(word.lower(), known)}",
        hint=f"not searched, because missing: {missing}" if missing else "pass the path of the model",
    )


def models_in(folder: Path) -> Iterator[Path]:
    """Yield the .safetensors files, indices of shards and diffusers folders below a folder."""
    for root, below, files in os.walk(folder, followlinks=False):
        place = Path(root)
        if _MODEL_INDEX in files:
            below.clear()  # its files are parts of one model
            yield place
            continue
        below[:] = sorted(name for name in below if not name.startswith("."))
        sharded = [name.removesuffix(_INDEX) for name in files if name.lower().endswith(_INDEX)]
        for name in sorted(files):
            is_shard = any(name.startswith(f"{stem}-") for stem in sharded)
            if name.lower().endswith((_WEIGHTS, _INDEX)) and not is_shard:
                yield place / name


def names_of(model: Path, folder: Path) -> set[str]:
    """Return the names of a model in lower case: with and without its folders and its extension."""
    below = PurePath(os.path.relpath(model, folder)).as_posix().lower()
    words = {below, below.rpartition("/")[2]}
    return words | {word.removesuffix(ending) for word in words for ending in (_INDEX, _WEIGHTS)}
