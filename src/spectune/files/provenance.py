"""The metadata of a file: its role, its base, and facts about the model that no tensor shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, get_args

from spectune.errors import InputError, did_you_mean
from spectune.files.text import load_json

PREFIX = "spectune."
LAYOUT_KEY = "spectune.layout"
ADAPTERS_KEY = "spectune.adapters"  # the adapters that a model was rebuilt with: files, roles, strengths
SLICES_KEY = "spectune.slices"  # the files, traits and weights that a file was combined from
MERGED_KEY = "spectune.merged"  # the checkpoints that a weighted sum was made from: files, weights, hashes

PredictionName = Literal["eps", "v", "flow"]
NoiseSchedule = Literal["sdxl", "zero_terminal_snr"]  # of eps and v
# Marker tensors: other programs infer prediction and schedule from their presence, not from their values.
V_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"
Padding = Literal["zeros", "reflect"]
FrameKind = Literal["principal", "minor", "plain", "svd-down", "gradient", "data"]  # docs/reference/frames.md
MODELSPEC_PREDICTION_KEY = "modelspec.prediction_type"
COMFYUI_PREDICTION_KEY = "modelspec.predict_key"  # of ComfyUI's save nodes, with the same values
KOHYA_V_KEY = "ss_v_parameterization"  # "True" or "False"
MODELSPEC_PREDICTIONS: Mapping[str, PredictionName] = {
    "eps": "eps",
    "epsilon": "eps",
    "v": "v",
    "v_pred": "v",
    "v_prediction": "v",
    "flow": "flow",
    "flow_matching": "flow",
    "flow_prediction": "flow",
    "rectified_flow": "flow",
    "rf": "flow",
    "vector_field": "flow",
}


class Role(StrEnum):
    """The purpose of a file."""

    MODEL = "model"
    PRINCIPAL = "principal"
    RESIDUAL = "residual"
    TUNED = "tuned"
    LORA = "lora"


@dataclass(frozen=True)
class Provenance:
    """The `spectune.*` metadata of a file; None for a missing entry. Files of other programs have none."""

    role: Role | None = None
    version: str | None = None  # version of spectune that wrote the file
    base_hash: str | None = None  # weights hash of the original model
    base_name: str | None = None  # file name of the original model, for messages only
    principal_hash: str | None = None
    start_name: str | None = None  # file of the tuned adapter that the training started from
    start_hash: str | None = None  # its weights hash
    frame: FrameKind | None = None  # kind of frame if training computed it from the base
    prediction: PredictionName | None = None
    flow_shift: float | None = None
    noise_schedule: NoiseSchedule | None = None
    vae_scale: float | None = None  # latents = (z - shift) * scale
    vae_shift: float | None = None
    vae_padding: Padding | None = None  # of the VAE's convolutions
    vae_name: str | None = None  # file of the VAE if it is not the model's VAE, for messages only

    def to_metadata(self) -> dict[str, str]:
        """Return the metadata entries `spectune.role`, ...; the inverse of from_metadata."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {PREFIX + name: str(value) for name, value in values if value is not None}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Provenance:
        """Parse metadata entries; raise InputError for an invalid value."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            text = metadata.get(PREFIX + field.name)
            if text is not None:
                values[field.name] = _parse(field.name, text)
        return cls(**values)


class HasProvenance:
    """A mixin that adds `provenance` to a class with `metadata`; it is parsed once, on first use."""

    metadata: Mapping[str, str]

    @cached_property
    def _provenance(self) -> Provenance:
        return Provenance.from_metadata(self.metadata)

    @property
    def provenance(self) -> Provenance:
        """Return the provenance in the metadata; raise InputError if the metadata is invalid."""
        return self._provenance


def _parse(field: str, text: str) -> Any:
    known = {
        "role": [role.value for role in Role],
        "frame": list(get_args(FrameKind)),
        "prediction": list(get_args(PredictionName)),
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


def modelspec_metadata(prediction: PredictionName | None) -> dict[str, str]:
    """Return the modelspec entry for a prediction; empty for flow, which modelspec does not define."""
    words = {"eps": "epsilon", "v": "v"}
    return {MODELSPEC_PREDICTION_KEY: words[prediction]} if prediction in words else {}


def modelspec_model(metadata: Mapping[str, str], *, title: str) -> dict[str, str]:
    """Return modelspec entries that identify an SDXL checkpoint; entries in `metadata` take precedence.

    Keys and values follow the modelspec standard 1.0.0, which does not define the shift of flow sampling.
    """
    entries = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": "1024x1024",
    }
    return {key: metadata.get(key, value) for key, value in entries.items()} | {"modelspec.title": title}


def spectune_version() -> str:
    """Return the version of the installed package, or `0` for a source tree that is not installed."""
    try:
        return version("spectune")
    except PackageNotFoundError:
        return "0"


def parse_json(text: str) -> object:
    """Parse a JSON text; return None if it is invalid, because metadata may come from any program."""
    try:
        return load_json(text)
    except ValueError:
        return None
