"""The interface of sources of named tensors: files, folders, and models that are computed on access."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from spectune.files.provenance import (
    COMFYUI_PREDICTION_KEY,
    KOHYA_V_KEY,
    MODELSPEC_PREDICTION_KEY,
    MODELSPEC_PREDICTIONS,
    V_KEY,
    ZERO_SNR_KEY,
    HasProvenance,
    PredictionName,
    Provenance,
)


@dataclass(frozen=True)
class TensorInfo:
    """The name, dtype and shape of a tensor, known without reading its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class WeightSource(Protocol):
    """A source that loads tensors by name: a file, or a merge that is computed on access."""

    @property
    def metadata(self) -> Mapping[str, str]: ...

    @property
    def provenance(self) -> Provenance:
        """Return the provenance in the metadata; raise InputError if the metadata is invalid."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return all tensors in the order of the file."""
        ...

    @property
    def label(self) -> str:
        """Return the name for messages, usually a file name."""
        ...

    def load(self, name: str) -> Tensor:
        """Return a tensor on the CPU; callers must not change it in place."""
        ...


class TensorFile(Protocol):
    """A part of a checkpoint: an open file, or several files with other tensor names."""

    @property
    def metadata(self) -> Mapping[str, str]: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def paths(self) -> tuple[Path, ...]: ...

    def load(self, name: str) -> Tensor: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class RenamedTensor:
    """A tensor under its new name, and the function that loads it."""

    info: TensorInfo
    load: Callable[[], Tensor]


class RenamedFiles:
    """Several files as one, with other tensor names."""

    def __init__(self, entries: Mapping[str, RenamedTensor], files: Sequence[TensorFile]) -> None:
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


@dataclass(frozen=True)
class MemorySource(HasProvenance):
    """A source of tensors that are already in memory."""

    values: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    label: str = "memory"

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @cached_property
    def _infos(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(name, t.dtype, tuple(t.shape)) for name, t in self.values.items()}

    def load(self, name: str) -> Tensor:
        return self.values[name]


def declared_prediction(source: WeightSource) -> PredictionName | None:
    """Return the prediction that a file declares, or None.

    The sources, in order: spectune's metadata; the tensor `v_pred`, which ComfyUI and Forge follow whatever
    the metadata say; the metadata of modelspec, also under the key that ComfyUI writes; those of sd-scripts.
    """
    if source.provenance.prediction is not None:
        return source.provenance.prediction
    if V_KEY in source.tensors:
        return "v"
    for key in (MODELSPEC_PREDICTION_KEY, COMFYUI_PREDICTION_KEY):
        word = re.sub(r"[\s-]+", "_", source.metadata.get(key, "").strip().lower())
        if word in MODELSPEC_PREDICTIONS:
            return MODELSPEC_PREDICTIONS[word]
    return "v" if source.metadata.get(KOHYA_V_KEY, "").lower() == "true" else None


def declared_zero_snr(source: WeightSource) -> bool:
    """Return whether spectune's metadata or the tensor `ztsnr` declares that the schedule ends in noise."""
    schedule = source.provenance.noise_schedule
    return ZERO_SNR_KEY in source.tensors if schedule is None else schedule == "zero_terminal_snr"
