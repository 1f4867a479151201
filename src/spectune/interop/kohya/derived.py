"""Derive values from several flags of a command: objective, optimizer, trained parts and learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from spectune.interop.kohya.command_line import Command
from spectune.interop.kohya.rules import literal, number
from spectune.training.optim.kinds import OPTIMIZERS, OptimizerKind, check_options, traits_of
from spectune.training.recipe.sections.model import ALL_PARTS, PartName

Objective = Literal["eps", "v", "flow"]

# Names in sd-scripts, in lower case, without the import path -> names in spectune.
OPTIMIZER_NAMES: Mapping[str, str] = {
    "adamw": "adamw",
    "pagedadamw": "adamw",
    "pagedadamw32bit": "adamw",
    "adamw8bit": "adamw8bit",
    "pagedadamw8bit": "adamw8bit",
    "adafactor": "adafactor",
    "lion": "lion",
    "lion8bit": "lion",
    "pagedlion8bit": "lion",
    "prodigy": "prodigy",
    "prodigyplusschedulefree": "prodigy_plus_schedule_free",
    "adamwschedulefree": "adamw_schedule_free",
    "dadaptation": "dadapt_adam",
    "dadaptadam": "dadapt_adam",
    "dadaptadampreprint": "dadapt_adam",
}

FULL = "full"  # the value of --network_dim that stands for sdxl_train.py, which has no rank


def objective_of(command: Command) -> Objective:
    if command.has("flow_matching") or command.has("flow_model"):
        return "flow"
    return "v" if command.has("v_parameterization") else "eps"


def kohya_optimizer(command: Command) -> str:
    """Return the optimizer's name as sd-scripts writes it."""
    if word := command.value("optimizer_type"):
        return word
    if command.has("use_8bit_adam"):
        return "AdamW8bit"
    return "Lion" if command.has("use_lion_optimizer") else "AdamW"


def optimizer_name(kohya_name: str) -> str | None:
    """Return spectune's name of an optimizer of sd-scripts, or None if spectune does not have it."""
    name = OPTIMIZER_NAMES.get(kohya_name.rpartition(".")[2].lower())
    return name if name in OPTIMIZERS else None


# Default optimizer arguments of sd-scripts that differ from those of spectune.
DEFAULT_OPTIONS: Mapping[str, Mapping[str, Any]] = {"adafactor": {"relative_step": True}}


def options_of(command: Command) -> dict[str, Any]:
    """Return the optimizer's arguments that spectune also has, with the defaults that sd-scripts adds."""
    name = optimizer_name(kohya_optimizer(command))
    if name is None:
        return {}
    arguments = [text.partition("=") for text in command.values("optimizer_args")]
    remaining = dict(DEFAULT_OPTIONS.get(name, {})) | {
        key.strip(): literal(value.strip()) for key, equals, value in arguments if equals
    }
    options: dict[str, Any] = {}
    while fitting := {key: value for key, value in remaining.items() if _fits(name, options | {key: value})}:
        # Repeat, because an argument may require one that follows it.
        options |= fitting
        remaining = {key: value for key, value in remaining.items() if key not in fitting}
    return options


def _fits(name: str, options: Mapping[str, Any]) -> bool:
    try:
        check_options(name, options)
    except ValueError:
        return False
    return True


def traits(command: Command) -> OptimizerKind:
    """Return the traits of the recipe's optimizer with its options."""
    name = optimizer_name(kohya_optimizer(command)) or "adamw"
    return traits_of(name, check_options(name, options_of(command)))


def network_argument(command: Command, name: str) -> str | None:
    """Return the value of `name=value` among the --network_args."""
    for argument in command.values("network_args"):
        key, equals, value = argument.partition("=")
        if equals and key.strip() == name:
            return value.strip()
    return None


def rates_of(command: Command) -> dict[PartName, float | None]:
    """Return the learning rate of each part in sd-scripts, or None if it is missing or not a number."""
    both = _rates(command.values("text_encoder_lr")) or _rates(command.values("learning_rate_te"))
    base = _rates(command.values("learning_rate"))
    first = _rates(command.values("text_encoder_lr1")) or _rates(command.values("learning_rate_te1"))
    second = _rates(command.values("text_encoder_lr2")) or _rates(command.values("learning_rate_te2"))
    return {
        "unet": _first(_rates(command.values("unet_lr")), base),
        "te1": _first(first, both, base),
        "te2": _first(second, both[1:], both, base),
    }


def _rates(values: tuple[str, ...]) -> list[float]:
    try:
        # A list in a config file can arrive as one word.
        return [number(word) for word in " ".join(values).strip("[]").replace(",", " ").split()]
    except ValueError:
        return []


def _first(*candidates: list[float]) -> float | None:
    return next((rates[0] for rates in candidates if rates), None)


def is_full(command: Command) -> bool:
    """Return whether a command is a full fine-tuning: sdxl_train.py without a file of factors."""
    return command.script == "sdxl_train.py" and not command.has("network_weights")


def steps_in_backward(command: Command) -> bool:
    """Return whether sd-scripts and spectune both can run the optimizer inside of the backward pass."""
    accumulation = command.value("gradient_accumulation_steps") or "1"
    return (
        is_full(command)
        and command.has("fused_backward_pass")
        and accumulation == "1"
        and traits(command).tensorwise
    )


def parts_of(command: Command) -> tuple[PartName, ...]:
    """Return the parts that sd-scripts trains: the selected ones with a nonzero learning rate."""
    selected = ALL_PARTS
    if command.has("network_train_text_encoder_only"):
        selected = ("te1", "te2")
    elif command.has("network_train_unet_only") or (
        command.script == "sdxl_train.py" and not command.has("train_text_encoder")
    ):
        selected = ("unet",)
    rates = rates_of(command)
    return tuple(part for part in selected if rates[part] != 0)


def captions_vary(command: Command) -> bool:
    return command.has("shuffle_caption") or command.has("caption_tag_dropout_rate")


def pixels_vary(command: Command) -> bool:
    return command.has("random_crop") or command.has("color_aug")
