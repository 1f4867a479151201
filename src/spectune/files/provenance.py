"""Where a file comes from: the hash of its numbers, its role, and what its tensors cannot tell."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spectune.errors import InputError, did_you_mean
from spectune.files.reader import DTYPE_NAMES, WeightSource

PREFIX = "spectune."
LAYOUT_KEY = "spectune.layout"
ADAPTERS_KEY = "spectune.adapters"  # what a model was rebuilt with: files, roles, strengths
SLICES_KEY = "spectune.slices"  # of which files, traits and weights a file was put together

Prediction = Literal["eps", "v", "flow"]
NoiseSchedule = Literal["sdxl", "zero_terminal_snr"]  # of eps and v
# Tensors by which ComfyUI and others know what a checkpoint predicts and on which schedule; only names count.
V_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"
Padding = Literal["zeros", "reflect"]
FrameKind = Literal["principal", "minor", "plain", "gradient", "data"]  # docs/reference/frames.md
MODELSPEC_PREDICTION_KEY = "modelspec.prediction_type"
_MODELSPEC_PREDICTIONS: Mapping[str, Prediction] = {"epsilon": "eps", "v": "v", "v_prediction": "v"}


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw little-endian bytes of a CPU tensor, without a copy if it is contiguous."""
    assert sys.byteorder == "little", "safetensors files are little-endian"
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


class WeightsHasher:
    """The identity of a set of numbers, whatever the order of tensors, layout or metadata of their file.

    sha256 over, for the names sorted, ``name NUL dtype NUL shape NUL`` and the sha256 of the tensor's bytes.
    """

    def __init__(self) -> None:
        self._entries: dict[str, bytes] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        shape = "x".join(str(n) for n in tensor.shape)
        head = f"{name}\0{DTYPE_NAMES[tensor.dtype]}\0{shape}\0".encode()
        self._entries[name] = head + hashlib.sha256(tensor_bytes(tensor)).digest()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def copy(self, name: str, other: WeightsHasher) -> None:
        """Take over a tensor that is known to be the same, bit for bit."""
        self._entries[name] = other._entries[name]

    def differing(self, other: WeightsHasher) -> int:
        """How many tensors of this set `other` does not have bit for bit."""
        return sum(other._entries.get(name) != entry for name, entry in self._entries.items())

    def hexdigest(self) -> str:
        return hashlib.sha256(b"".join(self._entries[name] for name in sorted(self._entries))).hexdigest()


def weights_hash(source: WeightSource) -> str:
    """The hash of all numbers of `source`; reads every tensor once."""
    hasher = WeightsHasher()
    for name in source.tensors:
        hasher.add(name, source.load(name))
    return hasher.hexdigest()


class Role(StrEnum):
    """What a file is for."""

    MODEL = "model"
    PRINCIPAL = "principal"
    RESIDUAL = "residual"
    TUNED = "tuned"
    LORA = "lora"


@dataclass(frozen=True)
class Provenance:
    """What the metadata of a file says about it; None where it says nothing, as in any foreign file."""

    role: Role | None = None
    version: str | None = None  # of the spectune that wrote the file
    base_hash: str | None = None  # weights hash of the original model
    base_name: str | None = None  # its file name, for messages only
    principal_hash: str | None = None
    frame: FrameKind | None = None  # that a training made of the base itself
    prediction: Prediction | None = None
    flow_shift: float | None = None
    noise_schedule: NoiseSchedule | None = None
    vae_scale: float | None = None  # latents = (z - shift) * scale
    vae_shift: float | None = None
    vae_padding: Padding | None = None  # of its convolutions
    vae_name: str | None = None  # file of an autoencoder other than the model's own, for messages only

    def to_metadata(self) -> dict[str, str]:
        """Metadata entries `spectune.role` and so on; from_metadata is the inverse."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {PREFIX + name: str(value) for name, value in values if value is not None}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Provenance:
        """Raises InputError for a value that no spectune has written."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            text = metadata.get(PREFIX + field.name)
            if text is not None:
                values[field.name] = _parse(field.name, text)
        return cls(**values)


def _parse(field: str, text: str) -> Any:
    known = {
        "role": [role.value for role in Role],
        "frame": list(get_args(FrameKind)),
        "prediction": list(get_args(Prediction)),
        "vae_padding": list(get_args(Padding)),
        "noise_schedule": list(get_args(NoiseSchedule)),
    }.get(field)
    if known is not None and text not in known:
        raise InputError(
            f"metadata {PREFIX}{field} is `{text}`: expected one of {', '.join(known)}"
            + did_you_mean(text, known)
        )
    if field == "role":
        return Role(text)
    if field in ("flow_shift", "vae_scale", "vae_shift"):
        return _number(field, text)
    return text


def _number(field: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"metadata {PREFIX}{field} is `{text}`: expected a number")
    if field == "flow_shift" and value <= 0:
        raise InputError(f"metadata {PREFIX}{field} is `{text}`: expected a positive number")
    return value


def modelspec_metadata(prediction: Prediction | None) -> dict[str, str]:
    """How other programs are told the prediction: no entry for flow, which modelspec has no word for."""
    words = {"eps": "epsilon", "v": "v"}
    return {MODELSPEC_PREDICTION_KEY: words[prediction]} if prediction in words else {}


def modelspec_model(metadata: Mapping[str, str], *, title: str) -> dict[str, str]:
    """The entries by which programs and model databases know a whole SDXL; author and license stay.

    Keys and values as in the modelspec standard 1.0.0; it has no word for the shift of flow sampling.
    """
    entries = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": "1024x1024",
    }
    return {key: metadata.get(key, value) for key, value in entries.items()} | {"modelspec.title": title}


def declared_prediction(source: WeightSource) -> Prediction | None:
    """What the model predicts, as far as the file says so: our metadata, modelspec, or the key `v_pred`."""
    ours = Provenance.from_metadata(source.metadata).prediction
    if ours is not None:
        return ours
    modelspec = source.metadata.get(MODELSPEC_PREDICTION_KEY, "")
    if modelspec in _MODELSPEC_PREDICTIONS:
        return _MODELSPEC_PREDICTIONS[modelspec]
    return "v" if V_KEY in source.tensors else None


def declared_zero_snr(source: WeightSource) -> bool:
    """Whether the file says that its noise schedule ends in pure noise: our metadata, or the key `ztsnr`."""
    ours = Provenance.from_metadata(source.metadata).noise_schedule
    return ZERO_SNR_KEY in source.tensors if ours is None else ours == "zero_terminal_snr"


def spectune_version() -> str:
    """The version of the installed package, or `0` in a source tree that is not installed."""
    try:
        return version("spectune")
    except PackageNotFoundError:
        return "0"
