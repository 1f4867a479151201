"""Read the configurations of a diffusers folder: heads, norm groups, schedule, VAE scale and shift."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from spectune.errors import InputError
from spectune.files.provenance import LAYOUT_KEY, PREFIX, PredictionName, Provenance
from spectune.files.text import load_json
from spectune.sdxl.layout import (
    HEAD_CHANNELS,
    NORM_GROUPS,
    SDXL_VAE_SCALE,
    SDXL_VAE_SHIFT,
    Layout,
    check_hint,
    read_hints,
)

SCHEDULER = "scheduler/scheduler_config.json"
UNET = "unet/config.json"
TE1 = "text_encoder/config.json"
TE2 = "text_encoder_2/config.json"
VAE = "vae/config.json"
_HINT_FILES = {
    "unet_heads": UNET,
    "te1_heads": TE1,
    "te2_heads": TE2,
    "unet_norm_groups": UNET,
    "vae_norm_groups": VAE,
}

_LARGEST_NUMBER = 1e30  # a whole number in JSON may be too large for a float
_PREDICTIONS: Mapping[str, PredictionName] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "flow_prediction": "flow",
}


@dataclass(frozen=True)
class Schedule:
    """The prediction of the network and its noise schedule, from the scheduler's configuration."""

    prediction: PredictionName | None = None
    flow_shift: float | None = None  # for flow only
    zero_snr: bool = False  # the last timestep is pure noise


@dataclass(frozen=True)
class FolderFacts:
    """The facts in the configurations of a folder; empty or None if not declared."""

    hints: Mapping[str, Any]  # entries of the metadata `spectune.layout`
    schedule: Schedule
    vae_scale: float | None  # latents = (z - shift) * scale
    vae_shift: float | None


def read_facts(folder: Path, layout: Layout) -> FolderFacts:
    """Read the configurations of a folder whose tensors have this layout; each file may be absent.

    Raises InputError for a damaged configuration, and for a value that a single-file SDXL cannot have.
    """
    unet, vae = read_config(folder / UNET), read_config(folder / VAE) if layout.vae else {}
    hints: dict[str, Any] = {
        "unet_heads": per_level(
            unet.get("num_attention_heads") or unet.get("attention_head_dim"), len(layout.unet.channels)
        ),
        "te1_heads": _text_heads(folder / TE1, layout.te1.activation),
        "te2_heads": _text_heads(folder / TE2, layout.te2.activation),
        "unet_norm_groups": unet.get("norm_num_groups"),
        "vae_norm_groups": vae.get("norm_num_groups"),
    }
    for key, value in hints.items():
        if value is not None:
            check_hint(key, value, str(folder / _HINT_FILES[key]))
    return FolderFacts(
        hints={key: value for key, value in hints.items() if value is not None},
        schedule=read_schedule(read_config(folder / SCHEDULER), str(folder / SCHEDULER)),
        vae_scale=config_number(vae, "scaling_factor", folder / VAE),
        vae_shift=config_number(vae, "shift_factor", folder / VAE),
    )


def read_config(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty dictionary if the file does not exist."""
    return parse_config(path.read_bytes(), str(path)) if path.is_file() else {}


def parse_config(raw: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object; raise InputError with `where` for anything else."""
    try:
        config = load_json(raw)
    except ValueError as error:
        raise InputError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{where} is not a JSON object")
    return cast(dict[str, Any], config)


def config_number(
    config: Mapping[str, Any],
    key: str,
    where: Path | str,
    *,
    default: float | None = None,
    positive: bool = False,
) -> float | None:
    """Return an entry of a configuration as a float, or `default`; raise InputError if it is no number."""
    value = config.get(key, default)
    if value is None and default is None:
        return None
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not abs(value) < _LARGEST_NUMBER  # also for NaN
        or (positive and not value > 0)
    ):
        expected = "a positive number" if positive else "a number"
        raise InputError(f"{where}: {key} is {value!r}: expected {expected}")
    return float(value)


def read_schedule(config: Mapping[str, Any], where: str) -> Schedule:
    """Return the schedule in a scheduler's configuration; raise InputError for an unknown prediction."""
    zero_snr = config.get("rescale_betas_zero_snr") or False
    if not isinstance(zero_snr, bool):
        raise InputError(f"{where}: rescale_betas_zero_snr is {zero_snr!r}: expected true or false")
    if "FlowMatch" in str(config.get("_class_name", "")):
        return Schedule("flow", config_number(config, "shift", where, default=1.0, positive=True), zero_snr)
    word = config.get("prediction_type")
    if word is None:
        return Schedule(zero_snr=zero_snr)
    if not isinstance(word, str) or word not in _PREDICTIONS:
        raise InputError(
            f"{where}: prediction_type is {word!r}: expected one of {', '.join(sorted(_PREDICTIONS))}"
        )
    prediction = _PREDICTIONS[word]
    shift = (
        config_number(config, "flow_shift", where, default=1.0, positive=True)
        if prediction == "flow"
        else None
    )
    return Schedule(prediction, shift, zero_snr)


def per_level(value: Any, levels: int) -> Any:
    """Return one value per level; diffusers writes a single number if all are equal."""
    return [value] * levels if type(value) is int else value


def folder_metadata(
    header: Mapping[str, str], facts: FolderFacts, layout: Layout, label: str
) -> dict[str, str]:
    """Return the metadata of the single file that is equivalent to a folder: the UNet's header and the facts.

    Heads, groups and VAE factors with SDXL's standard values are omitted. Raises InputError if the header and
    the configurations contradict each other.
    """
    in_header = read_hints(header)
    for key, value in facts.hints.items():
        _check_same(key, in_header.get(key), value, label)
    declared = read_hints({LAYOUT_KEY: json.dumps(facts.hints)})
    hints = in_header | {k: value for k, value in declared.items() if not _is_standard(k, value, layout)}
    provenance = _with_facts(Provenance.from_metadata(header), facts, label)
    layout_entry = {LAYOUT_KEY: json.dumps(hints)} if hints else {}
    return {**header, **provenance.to_metadata(), **layout_entry}


def _with_facts(provenance: Provenance, facts: FolderFacts, label: str) -> Provenance:
    declared: dict[str, Any] = {
        "prediction": facts.schedule.prediction,
        "flow_shift": facts.schedule.flow_shift,
        "vae_scale": facts.vae_scale,
        "vae_shift": facts.vae_shift,
    }
    standard = {"vae_scale": SDXL_VAE_SCALE, "vae_shift": SDXL_VAE_SHIFT}
    for key, value in declared.items():
        _check_same(key, getattr(provenance, key), value, label)
    new = {key: value for key, value in declared.items() if value is not None and value != standard.get(key)}
    return replace(provenance, **new)


def _check_same(key: str, in_header: Any, declared: Any, label: str) -> None:
    if in_header is not None and declared is not None and in_header != declared:
        raise InputError(
            f"{label} contradicts itself: {key} is {declared} in its configuration files, but "
            f"{in_header} in the metadata of its unet/ (`{PREFIX}*`)",
            hint="one of the two files belongs to another model: replace it with the file of this model",
        )


def _is_standard(key: str, value: Any, layout: Layout) -> bool:
    """Return whether an entry of `spectune.layout` has SDXL's standard value and can be omitted."""
    if key in ("unet_norm_groups", "vae_norm_groups"):
        return value == NORM_GROUPS
    widths = {
        "unet_heads": layout.unet.channels,
        "te1_heads": (layout.te1.width,),
        "te2_heads": (layout.te2.width,),
    }
    heads = value if key == "unet_heads" else [value]
    return tuple(n * HEAD_CHANNELS for n in heads) == widths[key]


def _text_heads(path: Path, activation: str) -> Any:
    config = read_config(path)
    configured = config.get("hidden_act", activation)
    if configured != activation:
        raise InputError(f"{path}: hidden_act is {configured!r}: expected {activation!r}, as in SDXL")
    return config.get("num_attention_heads")
