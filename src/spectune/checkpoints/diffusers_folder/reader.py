"""Read a diffusers folder lazily, with the tensor names of a single file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from spectune.checkpoints.diffusers_folder.config import FolderFacts, folder_metadata, read_facts
from spectune.checkpoints.diffusers_folder.keys import (
    EXTRAS_FILE,
    MATRICES_KEY,
    SUBFOLDERS,
    derived_tensors,
)
from spectune.checkpoints.diffusers_folder.subfolder import Subfolder, open_subfolder
from spectune.errors import InputError, counted, some_of
from spectune.files.provenance import parse_json
from spectune.files.reader import Checkpoint, open_file
from spectune.files.source import RenamedFiles, RenamedTensor, TensorInfo
from spectune.sdxl.inference import layout_of_modules
from spectune.sdxl.layout import PARTS, TE2_ROOT, Layout, PartName
from spectune.sdxl.state_dicts import Piece, joined, pieces_by_tensor, state_views

Opened = Mapping[PartName, Subfolder]


def open_folder(folder: Path) -> Checkpoint:
    """Open a diffusers folder as a checkpoint with the tensors of a single file.

    Full weights take precedence over a variant such as fp16. The second encoder's `logit_scale` and the first
    one's `position_ids` belong to no module. They get SDXL's values; in a folder that spectune wrote, the
    values of the single file it was written from.
    Raises InputError if a part other than the VAE is missing, a tensor has no counterpart in a single file,
    or the weights are pickled or quantized.
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
    return Checkpoint(folder, [RenamedFiles(entries, files)], metadata, label=label)


def _module_entries(opened: Opened, layout: Layout, spelling: Mapping[str, str]) -> dict[str, RenamedTensor]:
    """Map the single-file name of each tensor of a network to its place in the folder.

    `spelling` is the metadata of the extras file: it records unusual shapes of the single file.
    """
    matrices = _names_in(spelling.get(MATRICES_KEY, "[]"))
    if matrices is None:
        raise InputError(
            f"the metadata of {EXTRAS_FILE} is invalid: {some_of(list(spelling.values()))}",
            hint="write the folder again with spectune",
        )
    entries: dict[str, RenamedTensor] = {}
    for part, subfolder in opened.items():
        views = state_views(layout, part)
        subfolder.check_keys(set(views))
        for name, pieces in pieces_by_tensor(part, views).items():
            load = partial(_load_joined, subfolder, pieces, matrix=name in matrices)
            entries[name] = RenamedTensor(
                _joined_info(name, subfolder, pieces, matrix=name in matrices), load
            )
    return entries


def _other_entries(
    opened: Opened,
    extras: Checkpoint | None,
    layout: Layout,
    facts: FolderFacts,
    placed: Mapping[str, RenamedTensor],
) -> dict[str, RenamedTensor]:
    """Return the tensors that belong to no module: stored ones, and derived ones without an extras file."""
    entries: dict[str, RenamedTensor] = {}
    if extras is None:
        tensors = derived_tensors(
            layout.te1.context,
            placed[f"{TE2_ROOT}ln_final.weight"].info.dtype,
            v_prediction=facts.schedule.prediction == "v",
            zero_snr=facts.schedule.zero_snr,
        )
        for name, tensor in tensors.items():
            entries[name] = RenamedTensor(TensorInfo(name, tensor.dtype, tuple(tensor.shape)), tensor.clone)
    for subfolder in opened.values():
        for name, file_key in subfolder.loose.items():
            entries[name] = _stored(name, subfolder.file, file_key)
    if extras is not None:
        entries |= {name: _stored(name, extras, name) for name in extras.tensors}
    twice = sorted(entries.keys() & placed.keys())
    if twice:
        raise InputError(
            f"{EXTRAS_FILE} repeats {counted(len(twice), 'tensor')} of a subfolder: {some_of(twice)}",
            hint=f"{EXTRAS_FILE} belongs to another model: delete it or replace it",
        )
    return entries


def _stored(name: str, file: Checkpoint, file_key: str) -> RenamedTensor:
    info = file.tensors[file_key]
    return RenamedTensor(TensorInfo(name, info.dtype, info.shape), partial(file.load, file_key))


def _load_joined(subfolder: Subfolder, pieces: Sequence[Piece], *, matrix: bool) -> Tensor:
    return joined(pieces, [subfolder.load(piece.key) for piece in pieces], matrix=matrix)


def _joined_info(name: str, subfolder: Subfolder, pieces: Sequence[Piece], *, matrix: bool) -> TensorInfo:
    infos = [subfolder.state[piece.key] for piece in pieces]
    first = infos[0]
    for piece, info in zip(pieces, infos, strict=True):
        rows = piece.view.rows
        expected = first.shape if rows is None else (rows[1] - rows[0], *first.shape[1:])
        if (info.dtype, info.shape) != (first.dtype, expected):
            raise InputError(
                f"{piece.key} of {subfolder.file.label} does not fit into {name}: "
                f"expected {first.dtype} {expected}, got {info.dtype} {info.shape}",
                hint="the file is damaged, or parts of it belong to another model: download it again",
            )
    empty = [torch.empty(info.shape, dtype=info.dtype, device="meta") for info in infos]
    tensor = joined(pieces, empty, matrix=matrix)
    return TensorInfo(name, tensor.dtype, tuple(tensor.shape))


def _names_in(text: str) -> frozenset[str] | None:
    """Return the names in a JSON list of strings; None for any other text."""
    names = parse_json(text)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in cast(list[object], names)):
        return None
    return frozenset(cast(list[str], names))
