"""The shapes that a checkpoint is written in, chosen by the name of the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from torch import Tensor

from spectune.checkpoints.diffusers_folder.writer import FolderWriter
from spectune.errors import InputError
from spectune.files.reader import INDEX_SUFFIX, PICKLES
from spectune.files.shards import MAX_SHARD_BYTES, ShardedWriter
from spectune.files.source import TensorInfo
from spectune.files.weights_hash import WeightsHasher
from spectune.files.writer import RESERVE_BYTES, StreamWriter

_NOT_WRITTEN = (*PICKLES, ".json", ".gguf", ".onnx")


class TensorWriter(Protocol):
    """What takes the announced tensors under single-file names: one file, several shards, or a folder."""

    @property
    def path(self) -> Path: ...

    metadata: dict[str, str]  # may change until the writer closes

    @property
    def hash(self) -> str: ...

    @property
    def waiting(self) -> frozenset[str]: ...

    def differing(self, other: WeightsHasher) -> int: ...

    def hash_ahead(self, name: str, tensor: Tensor) -> None: ...

    def write(self, name: str, tensor: Tensor) -> None: ...

    def close(self) -> None: ...

    def commit(self) -> None: ...

    def abandon(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_writer(
    path: Path,
    infos: Sequence[TensorInfo],
    *,
    metadata: Mapping[str, str] | None = None,
    reserve_bytes: int = RESERVE_BYTES,
    force: bool = False,
    hold: bool = False,
    template: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> TensorWriter:
    """A writer for `x.safetensors`, for shards with `x.safetensors.index.json`, or else a diffusers folder.

    `template` is a diffusers folder whose small files a new folder takes over; `max_shard_bytes` is for
    shards. Raises InputError for a name that belongs to another kind of file.
    """
    path = Path(path)
    name = path.name.lower()
    if name.endswith(".safetensors"):
        return StreamWriter(
            path, infos, metadata=metadata, reserve_bytes=reserve_bytes, force=force, hold=hold
        )
    if name.endswith(f".safetensors{INDEX_SUFFIX}"):
        return ShardedWriter(
            path,
            infos,
            metadata=metadata,
            reserve_bytes=reserve_bytes,
            force=force,
            hold=hold,
            max_shard_bytes=max_shard_bytes,
        )
    if path.suffix.lower() in _NOT_WRITTEN:
        raise InputError(
            f"cannot write {path.name}: expected a name like x.safetensors, x.safetensors{INDEX_SUFFIX}, "
            "or that of a folder"
        )
    return FolderWriter(
        path,
        infos,
        metadata=metadata,
        reserve_bytes=reserve_bytes,
        force=force,
        hold=hold,
        template=template,
    )
