"""Read settings files: .toml files of sd-scripts and .json files of the kohya_ss interface."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from spectune.errors import InputError, counted
from spectune.interop.kohya.command_line import (
    SCRIPTS,
    Command,
    Flag,
    group_flags,
    parse_command,
    split_words,
)

# Names in the interface -> flags of sd-scripts.
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
# Settings of the interface itself, of `accelerate launch`, and of other kinds of networks.
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
# Settings that become part of another flag.
_NOT_FLAGS = frozenset(
    {
        "additional_parameters", "lr_warmup", "conv_dim", "conv_alpha", "module_dropout", "rank_dropout",
        "rank_dropout_scale", "train_norm", "use_cp", "use_tucker", "use_scalar", "dora_wd", "bypass_mode",
    }
)  # fmt: skip
_OFF = (None, "", False, 0, "0", "0.0", "None", "none", "no", [])


def parse_toml(text: str, label: str) -> Command:
    """Return the command with the settings of a configuration file. sd-scripts ignores its sections."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{label} is not valid TOML: {error}") from error
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= cast("dict[str, Any]", value) if isinstance(value, dict) else {key: value}
    flags = [Flag(key, _values(value)) for key, value in flat.items() if _is_on(value)]
    if not flags:
        raise InputError(f"{label} contains no settings", hint="pass a configuration file of sd-scripts")
    return Command(SCRIPTS[0], tuple(flags))


def parse_gui_json(text: str, label: str) -> Command:
    """Return the command that the interface starts. Settings that are off, empty or zero are left out."""
    try:
        data: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{label} is not valid JSON: {error}") from error
    if not isinstance(data, dict) or not data:
        raise InputError(f"{label} contains no settings: expected an object of names and values")
    settings = cast("dict[str, Any]", data)
    on = {key: value for key, value in settings.items() if value not in _OFF}
    flags = [_gui_flag(key, value) for key, value in on.items() if key not in _GUI_ONLY | _NOT_FLAGS]
    flags += _gui_network(on)
    flags += group_flags(split_words(str(on.get("additional_parameters", ""))))[0]
    notes = [f"dropped: {counted(len(settings) - len(on), 'setting')} that are off, empty or zero"]
    if gui_only := sorted(on.keys() & _GUI_ONLY):
        notes.append(f"dropped: settings of the interface itself: {', '.join(gui_only)}")
    if percent := on.get("lr_warmup"):
        flags.append(Flag("lr_warmup_steps", (str(float(percent) / 100),)))
    if settings.get("sdxl") is False:
        raise InputError(f"{label} does not train SDXL: its `sdxl` is off", hint="spectune trains SDXL only")
    return Command(SCRIPTS[0], tuple(flags), notes=tuple(notes))


def _gui_flag(key: str, value: Any) -> Flag:
    if key == "xformers":  # the value names the attention
        return Flag(str(value))
    if key in ("optimizer_args", "network_args", "lr_scheduler_args"):
        return Flag(key, tuple(split_words(str(value))))
    return Flag(_GUI_NAMES.get(key, key), _values(value))


def _gui_network(on: Mapping[str, Any]) -> list[Flag]:
    """Return the network type and its arguments, which are separate settings in the interface."""
    kind = str(on.get("LoRA_type", "Standard"))
    flags = [Flag("network_module", (_GUI_TYPES.get(kind, kind),))]
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
    return flags + ([Flag("network_args", tuple(arguments))] if arguments else [])


def _is_on(value: Any) -> bool:
    return value is not None and value is not False and value != "" and value != []


def _values(value: Any) -> tuple[str, ...]:
    if value is True:
        return ()
    return tuple(str(item) for item in value) if isinstance(value, list) else (str(value),)


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, UTF-16 with a byte order mark (PowerShell), or Windows-1252."""
    raw = path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("cp1252", errors="replace")


def parse_file(path: Path) -> Command:
    """Read the command in a file: settings for .toml and .json, otherwise the text of a script."""
    text = read_text(path)
    match path.suffix.lower():
        case ".toml":
            return parse_toml(text, path.name)
        case ".json":
            return parse_gui_json(text, path.name)
        case _:
            return parse_command(text)


def with_config_file(command: Command, folder: Path) -> Command:
    """Return `command` with the flags of its --config_file added.

    Flags of the command override those of the file, as in sd-scripts. The path is relative to `folder`.

    Raises:
        InputError: The file is missing or is not valid.
    """
    name = command.value("config_file")
    if name is None:
        return command
    path = folder / (name if name.endswith(".toml") else f"{name}.toml")
    if not path.is_file():
        raise InputError(
            f"--config_file {path} does not exist",
            hint="import the file itself, or run in the folder that contains it",
        )
    config = parse_toml(read_text(path), path.name)
    added = tuple(flag for flag in config.flags if not command.has(flag.name))
    return replace(command, flags=command.flags + added)
