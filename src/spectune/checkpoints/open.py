"""Open a checkpoint for reading or writing: a single file, shards with an index, or a diffusers folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TypedDict, Unpack

from spectune.checkpoints.diffusers_folder.reader import open_folder
from spectune.checkpoints.diffusers_folder.writer import FolderWriter
from spectune.checkpoints.plain_weights import with_plain_weights
from spectune.checkpoints.usual_names import with_usual_names
from spectune.errors import InputError, some_of
from spectune.files.reader import INDEX_SUFFIX, MODEL_INDEX, PICKLES, Checkpoint, open_file
from spectune.files.shards import MAX_SHARD_BYTES, ShardedWriter, open_sharded
from spectune.files.source import TensorInfo
from spectune.files.tensor_writer import TensorWriter
from spectune.files.writer import StreamWriter

_NOT_WRITTEN = (*PICKLES, ".json", ".gguf", ".onnx")


class WriterOptions(TypedDict, total=False):
    """The options of all writers; the defaults are those of `StreamWriter`."""

    metadata: Mapping[str, str] | None
    reserve_bytes: int  # space for metadata that is added later
    force: bool  # overwrite an existing target
    hold: bool  # keep the temporary name until `commit`


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a `.safetensors` file, a `*.index.json` with its shards, or a folder.

    A folder contains either one index with its shards, or a diffusers pipeline; `model_index.json` of a
    pipeline is accepted too. Tensors get the usual names of a single file: see `with_usual_names`. Scaled fp8
    is decoded: see `with_plain_weights`. Raises InputError for a file that is missing, damaged, incomplete,
    quantized in another way, or of another kind.
    """
    checkpoint = _open(Path(path))
    try:
        return with_usual_names(with_plain_weights(checkpoint))
    except BaseException:
        checkpoint.close()
        raise


def _open(path: Path) -> Checkpoint:
    if path.name == MODEL_INDEX:
        path = path.parent
    if path.is_dir():
        if (path / MODEL_INDEX).is_file():
            return open_folder(path)
        return open_sharded(_index_in(path))
    if path.name.endswith(INDEX_SUFFIX):
        return open_sharded(path)
    return open_file(path)


def _index_in(folder: Path) -> Path:
    indices = sorted(folder.glob(f"*.safetensors{INDEX_SUFFIX}"))
    if len(indices) == 1:
        return indices[0]
    if indices:
        raise InputError(
            f"{folder} contains {len(indices)} sharded checkpoints: {some_of([p.name for p in indices])}",
            hint=f"pass one of the *{INDEX_SUFFIX} files",
        )
    raise InputError(
        f"{folder} is a folder without a *.safetensors{INDEX_SUFFIX} and without a {MODEL_INDEX}",
        hint="pass a .safetensors file",
    )


def open_writer(
    path: Path,
    infos: Sequence[TensorInfo],
    *,
    template: Path | None = None,
    renewed: Collection[str] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    **options: Unpack[WriterOptions],
) -> TensorWriter:
    """Open a writer: `x.safetensors` is a file, `x.safetensors.index.json` shards, any other name a folder.

    A diffusers folder takes its small files from the folder `template`, except those in `renewed`, which
    are made anew. `max_shard_bytes` applies to shards.
    Raises InputError for names of other kinds of files, such as `.ckpt`.
    """
    path = Path(path)
    name = path.name.lower()
    if name.endswith(".safetensors"):
        return StreamWriter(path, infos, **options)
    if name.endswith(f".safetensors{INDEX_SUFFIX}"):
        return ShardedWriter(path, infos, max_shard_bytes=max_shard_bytes, **options)
    if path.suffix.lower() in _NOT_WRITTEN:
        raise InputError(
            f"cannot write {path.name}: expected a name like x.safetensors, x.safetensors{INDEX_SUFFIX}, "
            "or the name of a folder",
            hint="choose another name in `out`",
        )
    return FolderWriter(path, infos, template=template, renewed=renewed, **options)
