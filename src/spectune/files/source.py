"""A source of tensors by name: what files, folders, and models computed on the fly have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from spectune.files.provenance import (
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
    """Name, dtype and shape of a tensor, known before its values are read."""

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
    """Anything that yields tensors by name, lazily: a file, or a merge computed on the fly."""

    @property
    def metadata(self) -> Mapping[str, str]: ...

    @property
    def provenance(self) -> Provenance:
        """The provenance in the metadata; raises InputError if the metadata is damaged."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors in file order."""
        ...

    @property
    def label(self) -> str:
        """The name used in messages: a file name."""
        ...

    def load(self, name: str) -> Tensor:
        """Return the tensor on the CPU; callers never change it in place."""
        ...


class TensorFile(Protocol):
    """A part of a checkpoint: an open file, or several under other names."""

    @property
    def metadata(self) -> Mapping[str, str]: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def paths(self) -> tuple[Path, ...]: ...

    def load(self, name: str) -> Tensor: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class MemorySource(HasProvenance):
    """A source of tensors that are already in memory."""

    values: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    label: str = "memory"

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(name, t.dtype, tuple(t.shape)) for name, t in self.values.items()}

    def load(self, name: str) -> Tensor:
        return self.values[name]


def declared_prediction(source: WeightSource) -> PredictionName | None:
    """Return the prediction that our metadata, modelspec or the key `v_pred` declares, or None."""
    if source.provenance.prediction is not None:
        return source.provenance.prediction
    modelspec = source.metadata.get(MODELSPEC_PREDICTION_KEY, "")
    if modelspec in MODELSPEC_PREDICTIONS:
        return MODELSPEC_PREDICTIONS[modelspec]
    return "v" if V_KEY in source.tensors else None


def declared_zero_snr(source: WeightSource) -> bool:
    """Return whether our metadata or the key `ztsnr` declares a noise schedule that ends in pure noise."""
    schedule = source.provenance.noise_schedule
    return ZERO_SNR_KEY in source.tensors if schedule is None else schedule == "zero_terminal_snr"
