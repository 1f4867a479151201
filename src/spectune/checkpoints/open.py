"""Open a checkpoint of any form: a single file, shards with their index, or a diffusers folder."""

from __future__ import annotations

from pathlib import Path

from spectune.checkpoints.diffusers_folder.reader import open_folder
from spectune.errors import InputError, some_of
from spectune.files.reader import INDEX_SUFFIX, MODEL_INDEX, Checkpoint, open_file
from spectune.files.shards import open_sharded


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a single `.safetensors` file, a `*.index.json` with its shards, or a folder that holds one.

    A diffusers folder, or its `model_index.json`, is presented under the names of a single file.
    Raises InputError when the file is missing, damaged, incomplete or of another kind.
    """
    path = Path(path)
    if path.name == MODEL_INDEX:
        path = path.parent
    if path.is_dir():
        if (path / MODEL_INDEX).is_file():
            return open_folder(path)
        return open_sharded(_index_of_folder(path))
    if path.name.endswith(INDEX_SUFFIX):
        return open_sharded(path)
    return open_file(path)


def _index_of_folder(folder: Path) -> Path:
    indices = sorted(folder.glob(f"*.safetensors{INDEX_SUFFIX}"))
    if len(indices) == 1:
        return indices[0]
    if indices:
        raise InputError(
            f"{folder} holds {len(indices)} sharded checkpoints: {some_of([p.name for p in indices])}",
            hint=f"pass one of the *{INDEX_SUFFIX} files itself",
        )
    raise InputError(
        f"{folder} is a folder without a *.safetensors{INDEX_SUFFIX} or a {MODEL_INDEX}",
        hint="pass the .safetensors file itself",
    )
