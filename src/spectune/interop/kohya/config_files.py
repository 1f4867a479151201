"""Settings files: the .toml that sd-scripts reads, and the .json that the kohya_ss interface saves."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from spectune.errors import InputError
from spectune.interop.kohya.command_line import (
    SCRIPTS,
    Command,
    Given,
    group_flags,
    parse_command,
    split_words,
)

# What the interface calls a flag of sd-scripts.
_GUI_NAMES: Mapping[str, str] = {
    "epoch": "max_train_epochs",
    "optimizer": "optimizer_type",
    "max_resolution": "resolution",
    "lora_network_weights": "network_weights",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "sdxl_no_half_vae": "no_half_vae",
}
_GUI_TYPES: Mapping[str, str] = {
    "Standard": "networks.lora",
    "Kohya LoCon": "networks.lora",
    "LyCORIS/LoCon": "lycoris.kohya",
}
# Settings of the interface itself, of `accelerate launch`, and those that belong to other kinds of networks.
_GUI_ONLY = frozenset(
    {
        "LoRA_type", "LyCORIS_preset", "accelerate_extra_args", "block_alphas", "block_dims",
        "block_lr_zero_threshold", "constrain", "conv_block_alphas", "conv_block_dims", "decompose_both",
        "down_lr_weight", "dynamo_mode", "dynamo_use_dynamic", "dynamo_use_fullgraph",
        "extra_accelerate_launch_args", "factor", "gpu_ids", "main_process_port", "metadata_author",
        "metadata_description", "metadata_license", "metadata_tags", "metadata_title", "mid_lr_weight",
        "model_list", "multi_gpu", "noise_offset_type", "num_cpu_threads_per_process", "num_machines",
        "num_processes", "rescaled", "sdxl", "train_on_input", "unit", "up_lr_weight", "use_wandb",
    }
)  # fmt: skip
# Settings that become a part of another flag.
_NOT_FLAGS = frozenset(
    {
        "additional_parameters", "lr_warmup", "conv_dim", "conv_alpha", "module_dropout", "rank_dropout",
        "rank_dropout_scale", "train_norm", "use_cp", "use_tucker", "use_scalar", "dora_wd", "bypass_mode",
    }
)  # fmt: skip
_OFF = (None, "", False, 0, "0", "0.0", "None", "none", "no", [])


def parse_toml(text: str, label: str) -> Command:
    """The command that sd-scripts makes of a configuration file; sections are for the eye only."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{label} is not valid TOML: {error}") from error
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= cast("dict[str, Any]", value) if isinstance(value, dict) else {key: value}
    flags = [Given(key, _values(value)) for key, value in flat.items() if _is_on(value)]
    if not flags:
        raise InputError(f"{label} holds no settings")
    return Command(SCRIPTS[0], tuple(flags))


def parse_gui_json(text: str, label: str) -> Command:
    """The command that the interface would start; what is off, empty or zero there is no flag."""
    try:
        data: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{label} is not valid JSON: {error}") from error
    if not isinstance(data, dict) or not data:
        raise InputError(f"{label} holds no settings: expected an object of names and values")
    settings = cast("dict[str, Any]", data)
    on = {key: value for key, value in settings.items() if value not in _OFF}
    flags = [_gui_flag(key, value) for key, value in on.items() if key not in _GUI_ONLY | _NOT_FLAGS]
    flags += _gui_network(on)
    flags += group_flags(split_words(str(on.get("additional_parameters", ""))))[0]
    notes = [f"left out: {len(settings) - len(on)} settings that are off, empty or zero"]
    if left := sorted(on.keys() & _GUI_ONLY):
        notes.append(f"left out: settings of the interface itself: {', '.join(left)}")
    if percent := on.get("lr_warmup"):
        flags.append(Given("lr_warmup_steps", (str(float(percent) / 100),)))
    if settings.get("sdxl") is False:
        raise InputError(f"{label} is for another model: its `sdxl` is off", hint="spectune trains SDXL")
    return Command(SCRIPTS[0], tuple(flags), notes=tuple(notes))


def _gui_flag(key: str, value: Any) -> Given:
    if key == "xformers":  # the interface holds the name of the attention there
        return Given(str(value))
    if key in ("optimizer_args", "network_args", "lr_scheduler_args"):
        return Given(key, tuple(split_words(str(value))))
    return Given(_GUI_NAMES.get(key, key), _values(value))


def _gui_network(on: Mapping[str, Any]) -> list[Given]:
    """The network's kind and arguments, which the interface keeps in settings of their own."""
    kind = str(on.get("LoRA_type", "Standard"))
    flags = [Given("network_module", (_GUI_TYPES.get(kind, kind),))]
    names = ["module_dropout", "rank_dropout"]
    if kind != "Standard":
        names += ["conv_dim", "conv_alpha"]
    if kind.startswith("LyCORIS"):
        names += [
            "rank_dropout_scale",
            "train_norm",
            "use_cp",
            "use_tucker",
            "use_scalar",
            "dora_wd",
            "bypass_mode",
        ]
    arguments = [f"{name}={on[name]}" for name in names if name in on]
    if kind.startswith("LyCORIS") and "LyCORIS_preset" in on:
        arguments.append(f"preset={on['LyCORIS_preset']}")
    return flags + ([Given("network_args", tuple(arguments))] if arguments else [])


def _is_on(value: Any) -> bool:
    return value is not None and value is not False and value != "" and value != []


def _values(value: Any) -> tuple[str, ...]:
    if value is True:
        return ()
    return tuple(str(item) for item in value) if isinstance(value, list) else (str(value),)


def read_text(path: Path) -> str:
    """A text file of any editor: UTF-8, UTF-16 with its mark (PowerShell), else Western Windows."""
    raw = path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("cp1252", errors="replace")


def parse_file(path: Path) -> Command:
    """The command in a file: settings in .toml or .json, in any other the text of a script."""
    text = read_text(path)
    match path.suffix.lower():
        case ".toml":
            return parse_toml(text, path.name)
        case ".json":
            return parse_gui_json(text, path.name)
        case _:
            return parse_command(text)


def with_config_file(command: Command, folder: Path) -> Command:
    """`command` with the flags of its --config_file, which its own ones overrule as in sd-scripts.

    Raises InputError when the file cannot be read; `folder` is where its path starts.
    """
    name = command.value("config_file")
    if name is None:
        return command
    path = folder / (name if name.endswith(".toml") else f"{name}.toml")
    if not path.is_file():
        raise InputError(
            f"--config_file {path} does not exist",
            hint="import the file itself, or run in the folder it is in",
        )
    held = parse_toml(read_text(path), path.name)
    added = tuple(given for given in held.flags if not command.has(given.name))
    return replace(command, flags=command.flags + added)
