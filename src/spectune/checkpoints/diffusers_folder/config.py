"""What the small files of a diffusers folder say that no tensor tells: heads, groups, prediction, factors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from spectune.errors import InputError
from spectune.files.provenance import LAYOUT_KEY, PREFIX, Prediction, Provenance
from spectune.sdxl.layout import (
    HEAD_CHANNELS,
    NORM_GROUPS,
    SDXL_VAE_SCALE,
    SDXL_VAE_SHIFT,
    Layout,
    read_hints,
)

SCHEDULER = "scheduler/scheduler_config.json"
UNET = "unet/config.json"
TE1 = "text_encoder/config.json"
TE2 = "text_encoder_2/config.json"
VAE = "vae/config.json"

_PREDICTIONS: Mapping[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "flow_prediction": "flow"}


@dataclass(frozen=True)
class Schedule:
    """What the network predicts and over which noise, as a scheduler's configuration says it."""

    prediction: Prediction | None = None
    flow_shift: float | None = None  # of flow only
    zero_snr: bool = False  # the last timestep is pure noise


@dataclass(frozen=True)
class FolderFacts:
    """What the configurations of a folder say; empty or None where they say nothing."""

    hints: Mapping[str, Any]  # the entries of `spectune.layout`
    schedule: Schedule
    vae_scale: float | None  # latents = (z - shift) * scale
    vae_shift: float | None


def read_facts(folder: Path, layout: Layout) -> FolderFacts:
    """Read the configurations beside the tensors from which `layout` was inferred; all of them may be absent.

    Raises InputError for one that is damaged, or that says what no single file could.
    """
    unet, vae = read_config(folder / UNET), read_config(folder / VAE)
    hints: dict[str, Any] = {
        "unet_heads": per_level(
            unet.get("num_attention_heads") or unet.get("attention_head_dim"), len(layout.unet.channels)
        ),
        "te1_heads": _text_heads(folder / TE1, layout.te1.activation),
        "te2_heads": _text_heads(folder / TE2, layout.te2.activation),
        "unet_norm_groups": unet.get("norm_num_groups"),
        "vae_norm_groups": vae.get("norm_num_groups") if layout.vae else None,
    }
    return FolderFacts(
        hints={key: value for key, value in hints.items() if value is not None},
        schedule=read_schedule(read_config(folder / SCHEDULER), str(folder / SCHEDULER)),
        vae_scale=_factor(vae, "scaling_factor", folder) if layout.vae else None,
        vae_shift=_factor(vae, "shift_factor", folder) if layout.vae else None,
    )


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object out of a file, empty if there is no such file."""
    if not path.is_file():
        return {}
    return parse_config(path.read_bytes(), str(path))


def parse_config(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object; raises InputError, naming `where`, for anything else."""
    try:
        config = json.loads(raw)
    except ValueError as error:
        raise InputError(f"{where} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{where} is not a JSON object")
    return cast(dict[str, Any], config)


def read_schedule(config: Mapping[str, Any], where: str) -> Schedule:
    """The schedule of a scheduler's configuration; raises InputError for a prediction that is not known."""
    zero_snr = bool(config.get("rescale_betas_zero_snr", False))
    if "FlowMatch" in str(config.get("_class_name", "")):
        return Schedule("flow", _positive(config.get("shift", 1.0), "shift", where), zero_snr)
    word = config.get("prediction_type")
    if word is None:
        return Schedule(zero_snr=zero_snr)
    if word not in _PREDICTIONS:
        raise InputError(
            f"{where}: prediction_type is {word!r}: expected one of {', '.join(sorted(_PREDICTIONS))}"
        )
    prediction = _PREDICTIONS[word]
    shift = _positive(config.get("flow_shift", 1.0), "flow_shift", where) if prediction == "flow" else None
    return Schedule(prediction, shift, zero_snr)


def per_level(value: Any, levels: int) -> Any:
    """diffusers' short form, one value for all levels, written out."""
    return [value] * levels if isinstance(value, int) else value


def folder_metadata(
    header: Mapping[str, str], facts: FolderFacts, layout: Layout, label: str
) -> dict[str, str]:
    """The metadata of the single file that a folder presents: the UNet's header and what configurations add.

    Heads and groups that are SDXL's, and its VAE's factors, are left out, as every SDXL without metadata
    has them. Raises InputError when the header and a configuration contradict each other.
    """
    written = read_hints(header)
    for key, value in facts.hints.items():
        _check_same(key, written.get(key), value, label)
    told = read_hints({LAYOUT_KEY: json.dumps(facts.hints)})
    hints = written | {key: value for key, value in told.items() if not _is_standard(key, value, layout)}
    provenance = _with_facts(Provenance.from_metadata(header), facts, label)
    layout_entry = {LAYOUT_KEY: json.dumps(hints)} if hints else {}
    return {**header, **provenance.to_metadata(), **layout_entry}


def _with_facts(provenance: Provenance, facts: FolderFacts, label: str) -> Provenance:
    told: dict[str, Any] = {
        "prediction": facts.schedule.prediction,
        "flow_shift": facts.schedule.flow_shift,
        "vae_scale": facts.vae_scale,
        "vae_shift": facts.vae_shift,
    }
    usual = {"vae_scale": SDXL_VAE_SCALE, "vae_shift": SDXL_VAE_SHIFT}
    for key, value in told.items():
        _check_same(key, getattr(provenance, key), value, label)
    new = {key: value for key, value in told.items() if value is not None and value != usual.get(key)}
    return replace(provenance, **new)


def _check_same(key: str, written: Any, told: Any, label: str) -> None:
    if written is not None and told is not None and written != told:
        raise InputError(
            f"{label} contradicts itself: {key} is {told} by its configuration files, "
            f"{written} by the metadata of its unet/ (`{PREFIX}*`)",
            hint="one of them belongs to another model: put the right file there",
        )


def _is_standard(key: str, value: Any, layout: Layout) -> bool:
    if key in ("unet_norm_groups", "vae_norm_groups"):
        return value == NORM_GROUPS
    widths = {
        "unet_heads": list(layout.unet.channels),
        "te1_heads": layout.te1.width,
        "te2_heads": layout.te2.width,
    }
    counts, width = (value, widths[key]) if key == "unet_heads" else ([value], [widths[key]])
    return [n * HEAD_CHANNELS for n in counts] == width


def _text_heads(path: Path, activation: str) -> Any:
    config = read_config(path)
    found = config.get("hidden_act", activation)
    if found != activation:
        raise InputError(f"{path}: hidden_act is {found!r}: expected {activation!r}, as SDXL has it")
    return config.get("num_attention_heads")


def _factor(config: Mapping[str, Any], key: str, folder: Path) -> float | None:
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{folder / VAE}: {key} is {value!r}: expected a number")
    return float(value)


def _positive(value: Any, key: str, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise InputError(f"{where}: {key} is {value!r}: expected a positive number")
    return float(value)
