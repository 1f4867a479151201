"""The flags of sd-scripts for optimizer, learning rates and schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from spectune.errors import did_you_mean
from spectune.interop.kohya import derived
from spectune.interop.kohya.command_line import Command, Flag
from spectune.interop.kohya.rules import (
    MEMORY,
    FlagResult,
    FlagRule,
    Results,
    custom,
    custom_switch,
    each,
    ignored,
    ignores,
    literal,
    number,
    only_value,
    refuses,
    taken,
    unsupported,
    whole_number,
)
from spectune.training.optim.kinds import check_options
from spectune.training.optim.schedules import SCHEDULES
from spectune.training.recipe.sections.model import ALL_PARTS, PartName


def optimizer_type(flag: Flag, command: Command) -> Results:
    kohya_name = derived.kohya_optimizer(command)
    name = derived.optimizer_name(kohya_name)
    if name is None:
        suggestion = did_you_mean(kohya_name.lower(), sorted(derived.OPTIMIZER_NAMES))
        return unsupported(flag, f"the recipe uses adamw instead{suggestion}")
    is_paged = kohya_name.rpartition(".")[2].lower().startswith("paged")
    return taken(flag, {"optimizer.name": name}, "not paged" if is_paged else "")


def optimizer_args(flag: Flag, command: Command) -> Results:
    if not flag.values:
        return ignored(flag, "it has no value")
    return tuple(_optimizer_argument(flag, text, command) for text in flag.values)


def _optimizer_argument(flag: Flag, text: str, command: Command) -> FlagResult:
    key, equals, value = (part.strip() for part in text.partition("="))
    argument = Flag(key, (value,) if equals else (), parent=flag.name)
    name = derived.optimizer_name(derived.kohya_optimizer(command))
    if name is None:
        return unsupported(argument, "the optimizer is not supported")[0]
    if not equals:
        return unsupported(argument, "expected name=value")[0]
    if key not in derived.options_of(command):
        return unsupported(argument, _why_not(name, key, literal(value)))[0]
    if literal(value) is None:
        return ignored(argument, "None means the default")[0]
    return taken(argument, {f"optimizer.options.{key}": literal(value)})[0]


def _why_not(name: str, key: str, value: object) -> str:
    try:
        check_options(name, {key: value})
    except ValueError as error:
        return str(error)
    return "it conflicts with another argument"


# The parts that each flag for a learning rate applies to.
RATE_FLAGS: dict[str, tuple[PartName, ...]] = {
    "unet_lr": ("unet",),
    "text_encoder_lr": ("te1", "te2"),
    "text_encoder_lr1": ("te1",),
    "text_encoder_lr2": ("te2",),
    "learning_rate_te": ("te1", "te2"),
    "learning_rate_te1": ("te1",),
    "learning_rate_te2": ("te2",),
}


def learning_rate(flag: Flag, command: Command) -> Results:
    """Convert a learning rate of some or all parts. Zero freezes these parts."""
    number(only_value(flag))
    named = RATE_FLAGS.get(flag.name, ALL_PARTS)
    trained = derived.parts_of(command)
    parts: list[PartName] = [part for part in named if part in trained]
    rates = derived.rates_of(command)
    if not parts:
        frozen = any(rates[part] == 0 for part in named)
        if frozen and trained:
            return taken(flag, {"model.parts": list(trained)}, "a rate of zero freezes a part")
        if trained:
            return ignored(flag, "this part is frozen")
        return unsupported(flag, "all parts would be frozen")
    if flag.name == "learning_rate":
        rate = number(only_value(flag))
        settings: dict[str, object] = {"optimizer.learning_rate": rate}
        if rate == 0:
            return ignored(flag, "each trained part has its own rate")
    else:
        settings = {f"optimizer.part_learning_rates.{part}": rates[part] for part in parts}
    fixed = derived.traits(command).fixed_learning_rate
    if fixed is not None and any(value != fixed for value in settings.values()):
        return unsupported(flag, f"the optimizer finds its step size; its rate must be {fixed:g}")
    return taken(flag, settings)


_SCHEDULE_NAMES = {
    "constant_with_warmup": "constant",
    "cosine_with_restarts": "cosine_restarts",
    "cosine_with_min_lr": "cosine",
}


def lr_scheduler(flag: Flag, command: Command) -> Results:
    name = _SCHEDULE_NAMES.get(only_value(flag), only_value(flag))
    if derived.traits(command).schedule_free:
        return ignored(flag, "the optimizer is schedule-free")
    if derived.options_of(command).get("relative_step"):
        return ignored(flag, "relative_step of Adafactor replaces the schedule")
    if name not in SCHEDULES:
        return unsupported(flag, f"optimizer.schedule is one of {', '.join(SCHEDULES)}")
    return taken(flag, {"optimizer.schedule": name})


def warmup(flag: Flag, command: Command) -> Results:
    value = number(only_value(flag))
    if derived.traits(command).schedule_free:
        return ignored(flag, "the optimizer is schedule-free")
    if command.value("lr_scheduler") in (None, "constant"):
        return ignored(flag, "sd-scripts does not apply it to --lr_scheduler=constant")
    if 0 < value < 1:
        steps = command.value("max_train_steps")
        if steps is None or command.has("max_train_epochs"):
            return taken(flag, {"optimizer.warmup_share": value})
        return taken(flag, {"optimizer.warmup_steps": round(value * whole_number(steps))})
    return taken(flag, {"optimizer.warmup_steps": whole_number(only_value(flag))})


def schedule_setting(key: str, schedule: str, parse: Callable[[str], float] = number) -> FlagRule:
    """Return the rule of a setting for one value of --lr_scheduler."""

    def convert(flag: Flag, command: Command) -> Results:
        if command.value("lr_scheduler") != schedule or derived.traits(command).schedule_free:
            return ignored(flag, f"it is for --lr_scheduler={schedule}")
        return taken(flag, {f"optimizer.{key}": parse(only_value(flag))})

    return custom(f"`optimizer.{key}`, for {schedule}", convert)


def max_grad_norm(flag: Flag, command: Command) -> Results:
    if derived.steps_in_backward(command):
        return ignored(flag, "--fused_backward_pass has no norm of all gradients")
    return taken(flag, {"optimizer.max_grad_norm": number(only_value(flag))})


def fused_backward_pass(flag: Flag, command: Command) -> Results:
    if not derived.steps_in_backward(command):
        return ignored(flag, MEMORY)
    clips = number(command.value("max_grad_norm") or "1") != 0
    note = "sd-scripts clips each tensor by itself here, spectune clips none" if clips else ""
    return taken(flag, {"optimizer.step_in_backward": True, "optimizer.max_grad_norm": 0.0}, note)


OPTIMIZER: Mapping[str, FlagRule] = {
    "optimizer_type": custom("`optimizer.name`, see the table below", optimizer_type),
    "use_8bit_adam": custom_switch('`optimizer.name = "adamw8bit"`', optimizer_type),
    "use_lion_optimizer": custom_switch('`optimizer.name = "lion"`', optimizer_type),
    "optimizer_args": custom("`optimizer.options`, each of them checked", optimizer_args, max_values=None),
    "learning_rate": custom("`optimizer.learning_rate`", learning_rate),
    **{
        name: custom(
            "`optimizer.part_learning_rates`; 0 removes the part from `model.parts`",
            learning_rate,
            max_values=len(parts),
        )
        for name, parts in RATE_FLAGS.items()
    },
    "block_lr": refuses("all layers of a part have the same learning rate"),
    "lr_scheduler": custom("`optimizer.schedule`; ignored if the optimizer is schedule-free", lr_scheduler),
    "lr_warmup_steps": custom("`optimizer.warmup_steps`, or `warmup_share` for a share of the steps", warmup),
    "stop_text_encoder_training": ignores("sd-scripts does not have it for SDXL"),
    "lr_scheduler_num_cycles": schedule_setting("cycles", "cosine_with_restarts", whole_number),
    "lr_scheduler_power": schedule_setting("power", "polynomial"),
    "lr_scheduler_min_lr_ratio": schedule_setting("final_share", "cosine_with_min_lr"),
    "lr_decay_steps": refuses("a schedule ends with the run", unless=("0",)),
    "lr_scheduler_timescale": ignores("it belongs to inverse_sqrt"),
    **each("lr_scheduler_type lr_scheduler_args", refuses("`optimizer.schedule` names the schedule")),
    "max_grad_norm": custom("`optimizer.max_grad_norm`", max_grad_norm),
    "fused_backward_pass": custom_switch(
        "`optimizer.step_in_backward`, for sdxl_train.py; otherwise ignored", fused_backward_pass
    ),
    "use_sga": refuses("gradients are accumulated in fp32"),
    "no_sga": ignores("gradients are accumulated in fp32"),
    "fused_optimizer_groups": ignores(MEMORY),
}
