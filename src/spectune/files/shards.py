"""Checkpoints in several safetensors files of limited size, with an index."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from spectune.errors import InputError, some_of
from spectune.files.atomic_group import journalled, roll_back
from spectune.files.multi_file_writer import MultiFileWriter, PlannedFile
from spectune.files.reader import INDEX_SUFFIX, MAX_HEADER_BYTES, Checkpoint, SafetensorsFile, open_binary
from spectune.files.rename import rename
from spectune.files.source import TensorInfo
from spectune.files.text import load_json
from spectune.files.writer import RESERVE_BYTES, check_target

MAX_SHARD_BYTES = 5_000_000_000


class ShardedWriter(MultiFileWriter):
    """Writes `<stem>-00001-of-00003.safetensors` and so on, and `path`, their index.

    A shard holds at most `max_shard_bytes` of values, or a single larger tensor. Tensors are divided in the
    order of `infos`; the first shard has the metadata. The index is written last, and with `force` the
    previous index is deleted first: an index never lists shards of two models.
    Raises InputError before any work if index or shards exist and `force` is not set, or the disk is full.
    """

    def __init__(
        self,
        path: Path,
        infos: Sequence[TensorInfo],
        *,
        metadata: Mapping[str, str] | None = None,
        reserve_bytes: int = RESERVE_BYTES,
        force: bool = False,
        hold: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        super().__init__(Path(path), infos, metadata=metadata, hold=hold)
        assert self.path.name.endswith(f".safetensors{INDEX_SUFFIX}")
        assert max_shard_bytes > 0
        shards = shared_out(infos, max_shard_bytes)
        stem = self.path.name.removesuffix(f".safetensors{INDEX_SUFFIX}")
        names = [f"{stem}-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
        check_target(self.path, sum(info.nbytes for info in infos), force=force)
        self._force = force
        roll_back(self.path, is_complete=self.path.exists())
        self._check_free(names)
        self._old = _listed_shards(self.path)
        self._home = {info.name: name for name, shard in zip(names, shards, strict=True) for info in shard}
        plan = {
            name: PlannedFile(shard, self.metadata if name == names[0] else {})
            for name, shard in zip(names, shards, strict=True)
        }
        self._open_files(plan, reserve_bytes=reserve_bytes)

    def _put(self, name: str, tensor: Tensor) -> None:
        self._files[self._home[name]].write(name, tensor)

    def _add_late_data(self) -> None:
        first = next(iter(self._files.values()))
        first.metadata.clear()
        first.metadata.update(self.metadata)
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in self._infos.values())},
            "weight_map": dict(sorted(self._home.items())),
        }
        (self._partial / self.path.name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _check_free(self, names: Sequence[str]) -> None:
        existing = [name for name in names if (self.path.parent / name).exists()]
        if existing and not self._force:
            raise InputError(
                f"{len(existing)} shards exist in {self.path.parent}: {some_of(existing)}",
                hint="pass `force` to overwrite them, or choose another `out`",
            )

    def commit(self) -> None:
        folder = self.path.parent
        self._check_free([*self._files, self.path.name])  # again: another program may have written them
        new = [name for name in self._files if not (folder / name).exists()]
        renamed: list[str] = []
        try:
            with journalled(self.path, new):
                self.path.unlink(missing_ok=True)
                for name in (*self._files, self.path.name):
                    rename(self._partial / name, folder / name)
                    renamed.append(name)
            for name in self._old - self._files.keys():
                (folder / name).unlink(missing_ok=True)
            self._partial.rmdir()
        except OSError as error:
            self._keep = True
            with suppress(OSError):  # a disk that became read-only; the next run removes the shards
                for name in renamed:
                    rename(folder / name, self._partial / name)
            raise InputError(
                f"cannot rename the finished shards of {self.path}: {error.strerror}",
                hint=f"move the files in {self._partial} there yourself; they are complete",
            ) from error


def shared_out(infos: Sequence[TensorInfo], max_bytes: int) -> list[list[TensorInfo]]:
    """Divide tensors into shards of at most `max_bytes`, or of one tensor; return at least one shard."""
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in infos:
        if shards[-1] and filled + info.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(info)
        filled += info.nbytes
    return shards


def _listed_shards(index: Path) -> frozenset[str]:
    """Return the shards of an index that is about to be replaced; none if it is not an index."""
    try:
        return frozenset(read_index(index).values()) if index.is_file() else frozenset()
    except InputError:
        return frozenset()


def open_sharded(index: Path, *, label: str | None = None) -> Checkpoint:
    """Open the shards that an index lists; all must be in its folder."""
    weight_map = read_index(index)
    names = list(dict.fromkeys(weight_map.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise InputError(
            f"{index.name} lists {len(names)} shards; {len(missing)} of them are not in its folder: "
            f"{some_of(missing)}",
            hint=f"put all shards into {index.parent}",
        )
    files: list[SafetensorsFile] = []
    try:
        for name in names:
            files.append(SafetensorsFile(index.parent / name))
        _check_shards(index, weight_map, dict(zip(names, files, strict=True)))
    except BaseException:
        for file in files:
            file.close()
        raise
    metadata = {key: value for file in files for key, value in file.metadata.items()}
    return Checkpoint(index, files, metadata, label=label)


def read_index(index: Path) -> dict[str, str]:
    """Read {tensor name: shard}. Raises InputError for a file that is not an index."""
    with open_binary(index) as file:
        raw = file.read(MAX_HEADER_BYTES)
    try:
        items = load_json(raw)["weight_map"]
        if not isinstance(items, dict):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{index.name} is not an index of shards: expected JSON with a `weight_map`"
        ) from None
    if not items:
        raise InputError(f"{index.name} lists no tensors")
    for name, shard in cast("dict[str, Any]", items).items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(
                f"{index.name} places tensor {name} in {shard!r}: expected the name of a file in its folder"
            )
    return cast("dict[str, str]", items)


def _check_shards(index: Path, weight_map: Mapping[str, str], files: Mapping[str, SafetensorsFile]) -> None:
    absent = [name for name, shard in weight_map.items() if name not in files[shard].tensors]
    if absent:
        raise InputError(
            f"{len(absent)} tensors are not in the shard that {index.name} names: {some_of(absent)}"
        )
    homes: dict[str, str] = {}
    for shard, file in files.items():
        twice = [name for name in file.tensors if name in homes]
        if twice:
            raise InputError(
                f"{len(twice)} tensors of {shard} are also in {homes[twice[0]]}: {some_of(twice)}"
            )
        homes |= dict.fromkeys(file.tensors, shard)
