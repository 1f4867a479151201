"""Open the weights of one subfolder of a diffusers folder: choose the file and map its keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from spectune.checkpoints.diffusers_folder.config import read_config
from spectune.checkpoints.diffusers_folder.keys import STEMS, SUBFOLDERS, is_positions, loose_name, state_key
from spectune.checkpoints.plain_weights import with_plain_weights
from spectune.errors import InputError, some_of
from spectune.files.reader import MODEL_INDEX, PICKLES, USE_SAFETENSORS, Checkpoint, open_file
from spectune.files.shards import open_sharded
from spectune.files.source import TensorInfo
from spectune.sdxl.layout import NOT_SDXL, PartName, require
from spectune.sdxl.state_dicts import refuse_surplus

_STEM = "(?:diffusion_pytorch_model|model)"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\b")
# `model.fp16.safetensors`
_FILE = re.compile(rf"{_STEM}(?:\.(?P<variant>[^.]+))?\.safetensors")
# `model.safetensors.index.fp16.json`, or `model.safetensors.fp16.index.json` from older versions
_INDEX = re.compile(rf"{_STEM}\.safetensors(?:\.(?P<old>[^.]+))?\.index(?:\.(?P<variant>[^.]+))?\.json")


class Subfolder:
    """The opened weights of one part, by the keys of its module's state dict."""

    def __init__(self, part: PartName, file: Checkpoint) -> None:
        self.part: PartName = part
        self.file = file
        self.loose: dict[str, str] = {}  # tensors of no module: single-file name -> key in the file
        self._keys: dict[str, str] = {}  # state-dict key -> key in the file
        for file_key in file.tensors:
            self._place(file_key)
        self.state: Mapping[str, TensorInfo] = {key: file.tensors[at] for key, at in self._keys.items()}

    def load(self, key: str) -> Tensor:
        return self.file.load(self._keys[key])

    def check_keys(self, expected: set[str]) -> None:
        """Raise InputError if keys are missing or unexpected."""
        unexpected = [file_key for key, file_key in self._keys.items() if key not in expected]
        refuse_surplus(unexpected, self.file.label, "a single-file SDXL")
        require(self._keys, sorted(expected), self.file.label)

    def _place(self, file_key: str) -> None:
        key = state_key(self.part, file_key)
        name = loose_name(self.part, key)
        if name is not None:
            self.loose[name] = file_key
        elif is_positions(self.part, key):
            self._check_positions(file_key)
        elif key in self._keys:
            raise InputError(
                f"{self.file.label} has {key} twice: {self._keys[key]}, {file_key}",
                hint="remove one of the two tensors from the file",
            )
        else:
            self._keys[key] = file_key

    def _check_positions(self, file_key: str) -> None:
        """Raise InputError unless position_ids is 0, 1, 2, ...; it is not stored but derived on reading."""
        positions = self.file.load(file_key).flatten()
        if not torch.equal(positions.double(), torch.arange(positions.numel()).double()):
            raise InputError(f"{file_key} of {self.file.label} is not 0, 1, 2, ... as in every SDXL")


def open_subfolder(folder: Path, part: PartName) -> Subfolder:
    """Open the weights of one part of a diffusers folder.

    Raises InputError if there are no safetensors weights, or if they are quantized.
    """
    path = _find_weights(folder, part)
    label = f"{SUBFOLDERS[part]}/{path.name}"
    file = open_sharded(path, label=label) if path.suffix == ".json" else open_file(path, label=label)
    try:
        return Subfolder(part, with_plain_weights(file))
    except BaseException:
        file.close()
        raise


def _find_weights(folder: Path, part: PartName) -> Path:
    """Return the file with the full weights; without one, the file of the only variant, such as fp16."""
    subfolder = folder / SUBFOLDERS[part]
    if not subfolder.is_dir():
        kind = read_config(folder / MODEL_INDEX).get("_class_name", "no pipeline")
        raise InputError(
            f"{folder} has no {SUBFOLDERS[part]}/; its {MODEL_INDEX} declares {kind}", hint=NOT_SDXL
        )
    by_variant: dict[str | None, list[Path]] = {}  # None: the full weights
    for path in sorted(subfolder.iterdir()):
        match = _INDEX.fullmatch(path.name) or _FILE.fullmatch(path.name)
        if match and not _SHARD.search(path.name):
            by_variant.setdefault(match["variant"] or match.groupdict().get("old"), []).append(path)
    if not by_variant:
        raise missing_weights(subfolder, part)
    if None not in by_variant and len(by_variant) > 1:
        variants = [path.name for paths in by_variant.values() for path in paths]
        raise InputError(
            f"{subfolder} has several variants of its weights, but not the full weights: {some_of(variants)}",
            hint="keep only one of them in the folder",
        )
    paths = by_variant.get(None) or next(iter(by_variant.values()))
    if len(paths) > 1:
        raise InputError(
            f"{subfolder} has its weights twice: {some_of([path.name for path in paths])}",
            hint="keep only one of them in the folder",
        )
    return paths[0]


def missing_weights(
    subfolder: Path, part: PartName, *, hint: str = "the download may be incomplete"
) -> InputError:
    """Return the error for a folder without safetensors weights; it lists pickles if there are any."""
    pickles = sorted(path.name for path in subfolder.iterdir() if path.suffix.lower() in PICKLES)
    if pickles:
        return InputError(
            f"{subfolder} has its weights as a pickle, which can run any program when it is opened; "
            f"spectune never opens pickles: {some_of(pickles)}",
            hint=USE_SAFETENSORS,
        )
    return InputError(f"{subfolder} has no weights: expected {STEMS[part]}.safetensors", hint=hint)
