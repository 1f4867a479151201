"""The flags of the optimiser, its learning rates and their schedule."""

from __future__ import annotations

from spectune.errors import did_you_mean
from spectune.interop.kohya import settings as setup
from spectune.interop.kohya.command_line import Command, Given
from spectune.interop.kohya.outcomes import (
    Answer,
    Judge,
    guarded,
    ignored,
    literal,
    number,
    only,
    taken,
    unsupported,
    whole,
)
from spectune.training.optim import SCHEDULES, check_options
from spectune.training.recipe.sections import ALL_PARTS, PartName

Answers = tuple[Answer, ...]


def optimizer_type(given: Given, command: Command) -> Answers:
    word = setup.optimizer_word(command)
    name = setup.optimizer_name(word)
    if name is None:
        known = sorted(set(setup.OPTIMIZER_NAMES))
        return unsupported(given, f"adamw is written instead{did_you_mean(word.lower(), known)}")
    same = word.rpartition(".")[2].lower()
    return taken(given, {"optimizer.name": name}, "not paged" if same.startswith("paged") else "")


def optimizer_args(given: Given, command: Command) -> Answers:
    if not given.values:
        return ignored(given, "it is empty")
    return tuple(_optimizer_argument(given, text, command) for text in given.values)


def _optimizer_argument(given: Given, text: str, command: Command) -> Answer:
    key, equals, value = (part.strip() for part in text.partition("="))
    part = Given(key, (value,) if equals else (), within=given.name)
    name = setup.optimizer_name(setup.optimizer_word(command))
    if name is None:
        return unsupported(part, "it belongs to an optimiser that is not")[0]
    if not equals:
        return unsupported(part, "expected name=value")[0]
    if key not in setup.options_of(command):
        return unsupported(part, _why_not(name, key, literal(value)))[0]
    if literal(value) is None:
        return ignored(part, "None leaves it at its default")[0]
    return taken(part, {f"optimizer.options.{key}": literal(value)})[0]


def _why_not(name: str, key: str, value: object) -> str:
    try:
        check_options(name, {key: value})
    except ValueError as error:
        return str(error)
    return "it contradicts another argument"


RATES: dict[str, tuple[PartName, ...]] = {
    "unet_lr": ("unet",),
    "text_encoder_lr": ("te1", "te2"),
    "text_encoder_lr1": ("te1",),
    "text_encoder_lr2": ("te2",),
    "learning_rate_te": ("te1", "te2"),
    "learning_rate_te1": ("te1",),
    "learning_rate_te2": ("te2",),
}


def learning_rate(given: Given, command: Command) -> Answers:
    """The rate of all parts, or of some; a rate of zero freezes what it is for."""
    number(only(given))
    named = RATES.get(given.name, ALL_PARTS)
    trained = setup.parts_of(command)
    parts: list[PartName] = [part for part in named if part in trained]
    rates = setup.rates_of(command)
    if not parts:
        frozen = any(rates[part] == 0 for part in named)
        if frozen and trained:
            return taken(given, {"model.parts": list(trained)}, "a rate of zero freezes a part")
        if trained:
            return ignored(given, "what it is for is frozen")
        return unsupported(given, "nothing would train")
    if given.name == "learning_rate":
        rate = number(only(given))
        settings: dict[str, object] = {"optimizer.learning_rate": rate}
        if rate == 0:
            return ignored(given, "each part that trains has a rate of its own")
    else:
        settings = {f"optimizer.part_learning_rates.{part}": rates[part] for part in parts}
    fixed = setup.traits(command).fixed_learning_rate
    if fixed is not None and any(value != fixed for value in settings.values()):
        return unsupported(given, f"the optimiser finds its step size itself, with a rate of {fixed:g}")
    return taken(given, settings)


_SCHEDULE_NAMES = {
    "constant_with_warmup": "constant",
    "cosine_with_restarts": "cosine_restarts",
    "cosine_with_min_lr": "cosine",
}


def lr_scheduler(given: Given, command: Command) -> Answers:
    name = _SCHEDULE_NAMES.get(only(given), only(given))
    if setup.schedule_free(command):
        return ignored(given, "the optimiser is schedule-free")
    if name not in SCHEDULES:
        return unsupported(given, f"optimizer.schedule is one of {', '.join(SCHEDULES)}")
    return taken(given, {"optimizer.schedule": name})


def warmup(given: Given, command: Command) -> Answers:
    value = number(only(given))
    if setup.schedule_free(command):
        return ignored(given, "the optimiser is schedule-free")
    if command.value("lr_scheduler") in (None, "constant"):
        return ignored(given, "sd-scripts does not apply it to --lr_scheduler=constant")
    if 0 < value < 1:
        steps = command.value("max_train_steps")
        if steps is None or command.has("max_train_epochs"):
            return unsupported(given, "a share of the run; optimizer.warmup_steps counts steps")
        return taken(given, {"optimizer.warmup_steps": round(value * whole(steps))})
    return taken(given, {"optimizer.warmup_steps": whole(only(given))})


def schedule_setting(key: str, *, of: tuple[str, ...]) -> Judge:
    def judge(given: Given, command: Command) -> Answers:
        if command.value("lr_scheduler") not in of or setup.schedule_free(command):
            return ignored(given, f"it is for --lr_scheduler={of[0]}")
        value = number(only(given))
        return taken(given, {f"optimizer.{key}": int(value) if key == "cycles" else value})

    return guarded(judge)
