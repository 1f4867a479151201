"""A diffusers folder, read lazily, under the names of a single file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from spectune.checkpoints.diffusers_folder.config import FolderFacts, folder_metadata, read_facts
from spectune.checkpoints.diffusers_folder.keys import (
    EXTRAS_FILE,
    MATRICES_KEY,
    SUBFOLDERS,
    TE1_ROOT_KEY,
    derived_tensors,
)
from spectune.checkpoints.diffusers_folder.subfolder import Subfolder, open_subfolder
from spectune.errors import InputError, some_of
from spectune.files.reader import Checkpoint, open_file
from spectune.files.source import TensorFile, TensorInfo
from spectune.sdxl.inference import layout_of_modules
from spectune.sdxl.layout import PARTS, TE1_ROOT, TE1_SHORT_ROOT, TE2_ROOT, Layout, PartName
from spectune.sdxl.state_dicts import Piece, joined, pieces_by_tensor, state_views

Opened = Mapping[PartName, Subfolder]


def open_folder(folder: Path) -> Checkpoint:
    """A diffusers folder as a checkpoint with the tensors of a single file.

    In every subfolder the full weights are read where both they and a variant, such as fp16, are there. The
    second encoder's temperature and the first's position counter, which no module holds, are the values that
    SDXL has; in a folder that spectune wrote they are those of the single file it was written from.
    Raises InputError when a part other than the VAE is missing, a tensor has no place in a single file, or
    the weights are pickled or quantised.
    """
    label = folder.resolve().name
    with ExitStack() as stack:
        opened: dict[PartName, Subfolder] = {}
        for part in PARTS:
            if part != "vae" or (folder / SUBFOLDERS[part]).is_dir():
                opened[part] = open_subfolder(folder, part)
                stack.callback(opened[part].file.close)
        extras: Checkpoint | None = None
        if (folder / EXTRAS_FILE).is_file():
            extras = stack.enter_context(open_file(folder / EXTRAS_FILE))
        layout = layout_of_modules(
            {part: subfolder.state for part, subfolder in opened.items()},
            {part: subfolder.file.label for part, subfolder in opened.items()},
        )
        facts = read_facts(folder, layout)
        metadata = folder_metadata(opened["unet"].file.metadata, facts, layout, label)
        entries = _module_entries(opened, layout, {} if extras is None else extras.metadata)
        entries |= _other_entries(opened, extras, layout, facts, entries)
        files = [*(subfolder.file for subfolder in opened.values()), *([] if extras is None else [extras])]
        stack.pop_all()
    return Checkpoint(folder, [_Presented(entries, files)], metadata, label=label)


@dataclass(frozen=True)
class _Entry:
    """A tensor under its single-file name, before and after its numbers are read."""

    info: TensorInfo
    load: Callable[[], Tensor]


class _Presented:
    """Several files as one, under other names."""

    def __init__(self, entries: Mapping[str, _Entry], files: Sequence[TensorFile]) -> None:
        self.metadata: Mapping[str, str] = {}
        self.tensors: Mapping[str, TensorInfo] = {name: entry.info for name, entry in entries.items()}
        self._entries = entries
        self._files = files

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(path for file in self._files for path in file.paths)

    def load(self, name: str) -> Tensor:
        return self._entries[name].load()

    def close(self) -> None:
        for file in self._files:
            file.close()


def _module_entries(opened: Opened, layout: Layout, says: Mapping[str, str]) -> dict[str, _Entry]:
    """The tensors that stand in modules; `says` is what the extras say of how the single file has them."""
    te1 = says.get(TE1_ROOT_KEY, TE1_ROOT)
    matrices = _names_in(says.get(MATRICES_KEY, "[]"))
    if te1 not in (TE1_ROOT, TE1_SHORT_ROOT) or matrices is None:
        raise InputError(f"the metadata of {EXTRAS_FILE} is damaged: {some_of(list(says.values()))}")
    entries: dict[str, _Entry] = {}
    for part, subfolder in opened.items():
        views = state_views(layout, part, te1=te1)
        subfolder.check_keys(set(views))
        for name, pieces in pieces_by_tensor(part, views).items():
            load = partial(_load_joined, subfolder, pieces, matrix=name in matrices)
            entries[name] = _Entry(_joined_info(name, subfolder, pieces, matrix=name in matrices), load)
    return entries


def _other_entries(
    opened: Opened,
    extras: Checkpoint | None,
    layout: Layout,
    facts: FolderFacts,
    placed: Mapping[str, _Entry],
) -> dict[str, _Entry]:
    """The tensors that stand in no module: as found, and otherwise derived."""
    entries: dict[str, _Entry] = {}
    if extras is None:
        tensors = derived_tensors(
            layout.te1.context,
            placed[f"{TE2_ROOT}ln_final.weight"].info.dtype,
            v_prediction=facts.schedule.prediction == "v",
            zero_snr=facts.schedule.zero_snr,
        )
        for name, tensor in tensors.items():
            entries[name] = _Entry(TensorInfo(name, tensor.dtype, tuple(tensor.shape)), tensor.clone)
    for subfolder in opened.values():
        for name, there in subfolder.loose.items():
            entries[name] = _found(name, subfolder.file, there)
    if extras is not None:
        entries |= {name: _found(name, extras, name) for name in extras.tensors}
    twice = sorted(entries.keys() & placed.keys())
    if twice:
        raise InputError(
            f"{len(twice)} tensors of {EXTRAS_FILE} stand in a subfolder too: {some_of(twice)}",
            hint="it belongs to another model",
        )
    return entries


def _found(name: str, file: Checkpoint, there: str) -> _Entry:
    info = file.tensors[there]
    return _Entry(TensorInfo(name, info.dtype, info.shape), partial(file.load, there))


def _load_joined(subfolder: Subfolder, pieces: Sequence[Piece], *, matrix: bool) -> Tensor:
    return joined(pieces, [subfolder.load(piece.key) for piece in pieces], matrix=matrix)


def _joined_info(name: str, subfolder: Subfolder, pieces: Sequence[Piece], *, matrix: bool) -> TensorInfo:
    infos = [subfolder.state[piece.key] for piece in pieces]
    first = infos[0]
    for piece, info in zip(pieces, infos, strict=True):
        expected = first.shape if piece.view.rows is None else (_row_count(piece), *first.shape[1:])
        if (info.dtype, info.shape) != (first.dtype, expected):
            raise InputError(
                f"{piece.key} of {subfolder.file.label} does not join its neighbours into {name}: "
                f"expected {first.dtype} {expected}, got {info.dtype} {info.shape}"
            )
    empty = [torch.empty(info.shape, dtype=info.dtype, device="meta") for info in infos]
    whole = joined(pieces, empty, matrix=matrix)
    return TensorInfo(name, whole.dtype, tuple(whole.shape))


def _row_count(piece: Piece) -> int:
    assert piece.view.rows is not None
    return piece.view.rows[1] - piece.view.rows[0]


def _names_in(text: str) -> frozenset[str] | None:
    """The names of a JSON list, None if it is no such list."""
    try:
        names: Any = json.loads(text)
    except ValueError:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in cast(list[Any], names)):
        return None
    return frozenset(cast(list[str], names))
