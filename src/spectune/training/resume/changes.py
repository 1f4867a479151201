"""The recipe keys that may change when a run resumes, and what their change means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from spectune.errors import InputError, counted, printable
from spectune.pairs.rules import short_hash
from spectune.training.optim.kinds import OPTIMIZERS, check_options, traits_of
from spectune.training.recipe.sections.run import OptimizerSection
from spectune.training.state import NEW_RUN_HINT, SavedState, StateHeader

# Keys that may change, with all keys below them.
FREE = (
    "model.base",  # files may move: their hashes identify them
    "model.residual",
    "model.principal",
    "model.start",
    "data.folders",
    "data.cache_folder",
    "data.workers",
    "data.validation_folder",
    "optimizer.learning_rate",
    "optimizer.part_learning_rates",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.warmup_share",
    "optimizer.cycles",
    "optimizer.power",
    "optimizer.final_share",
    "optimizer.max_grad_norm",
    "optimizer.step_in_backward",
    "run.accumulation",  # with another number of processes
    "run.output",
    "run.steps",
    "run.epochs",
    "run.validation_times",
    "run.device",
    "run.timeout_minutes",
    "run.gradient_checkpointing",
    "run.compile",
    "run.offload",
    "run.stream",
    "run.tensorboard",
    "run.trackers",
    "run.resume",
)
# Keys that start like this may change too: how often, and what is kept, drawn and logged.
FREE_STARTS = ("run.save_", "run.keep_", "run.validate_", "run.preview", "run.log_")
_UNREPORTED = ("run.resume",)


@dataclass(frozen=True)
class Change:
    """A recipe key with another value than before the resume."""

    key: str
    before: Any  # JSON data; None also if the key is not set
    after: Any

    @property
    def is_free(self) -> bool:
        """Whether a run may resume with the change."""
        below = any(self.key == key or self.key.startswith(f"{key}.") for key in FREE)
        return below or self.key.startswith(FREE_STARTS)


def recipe_changes(was: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[Change]:
    """Return the keys whose values differ between two recipes as JSON data."""
    changes: list[Change] = []
    for key in sorted(was.keys() | now.keys()):
        before, after = was.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += recipe_changes(
                cast("Mapping[str, Any]", before), cast("Mapping[str, Any]", after), f"{prefix}{key}."
            )
        elif before != after:
            changes.append(Change(prefix + key, before, after))
    return changes


def check_recipe(saved: SavedState, recipe: Mapping[str, Any]) -> None:
    """Raise InputError if a key that must not change differs from the recipe of `saved`."""
    fixed = [change for change in recipe_changes(saved.header.recipe, recipe) if not change.is_free]
    _refuse(saved, [f"{one.key} was {_value(one.before)} and is now {_value(one.after)}" for one in fixed])


def check_continues(saved: SavedState, now: StateHeader) -> list[str]:
    """Return warnings about changes since `saved`.

    Raises:
        InputError: The base, the frames, the optimizer package or a recipe key that must not change differs.
    """
    check_recipe(saved, now.recipe)
    was = saved.header
    changed: list[str] = []
    if was.base_hash != now.base_hash:
        changed.append(f"base was {short_hash(was.base_hash)} and is now {short_hash(now.base_hash)}")
    if was.frame_hash != now.frame_hash:
        changed.append(f"frames were {was.frame_hash[:12]} and are now {now.frame_hash[:12]}")
    if was.optimizer_package != now.optimizer_package:
        changed.append(f"optimizer was {was.optimizer_package} and is now {now.optimizer_package}")
    _refuse(saved, changed)
    warnings: list[str] = []
    schedule = now.recipe.get("optimizer", {}).get("schedule", "constant")
    if was.steps != now.steps and schedule != "constant":
        warnings.append(
            f"the run had {counted(was.steps, 'step')} and now has {now.steps}: its {schedule} schedule "
            "covers the new length, so the learning rate jumps"
        )
    if was.batches_per_step not in (None, now.batches_per_step):
        warnings.append(
            f"an optimizer step had {counted(was.batches_per_step or 0, 'batch', 'batches')} and now has "
            f"{now.batches_per_step}: run.accumulation times the number of processes changed; the order of "
            "the images continues"
        )
    if was.data_hash != now.data_hash:
        warnings.append(
            f"images or captions changed since {saved.folder.name}: their order changes from here on"
        )
    return warnings


def _refuse(saved: SavedState, changed: list[str]) -> None:
    if changed:
        more = f"; ... ({len(changed) - 3} more)" if len(changed) > 3 else ""
        raise InputError(
            f"{saved.folder.name} belongs to another run: {'; '.join(changed[:3])}{more}", hint=NEW_RUN_HINT
        )


def changes_since(saved: SavedState, now: StateHeader) -> list[Change]:
    """Return the changes to report, which `check_recipe` accepted."""
    changes = recipe_changes(saved.header.recipe, now.recipe)
    return [change for change in changes if change.key not in _UNREPORTED]


def recorded(changes: list[Change], step: int) -> tuple[Mapping[str, Any], ...]:
    """Return changes made after `step` steps as entries of a state."""
    return tuple({"step": step, **asdict(change)} for change in changes)


def described(changes: list[Change], saved: SavedState, now: StateHeader) -> list[str]:
    """Return one line for each change, and what the change of a learning rate means."""
    was = saved.header
    lines = [
        f"  {one.key}: {_shown(one.key, one.before, was.recipe)} -> {_shown(one.key, one.after, now.recipe)}"
        for one in changes
    ]
    section = now.recipe.get("optimizer", {})
    if not any(change.key.startswith("optimizer.") for change in changes) and was.steps == now.steps:
        return lines
    name = section["name"]
    traits = traits_of(name, check_options(name, section["options"]))
    if traits.schedule_free:
        rates = ("optimizer.learning_rate", "optimizer.part_learning_rates")
        if any(change.key.startswith(rates) for change in changes):
            lines.append(
                "  the new rate applies from the next step; the average that is saved still contains the "
                "steps made so far, and a lower rate does not give new steps less weight in it"
            )
        return lines
    before, after = _next_rates(was, was.step), _next_rates(now, was.step)
    if before != after:
        both = ", ".join(f"{part} {before[part]:.4g} -> {after[part]:.4g}" for part in after)
        is_own = traits.fixed_learning_rate is not None
        meaning = f"factor of {name}'s own step size" if is_own else "learning rate"
        lines.append(f"  {meaning} in the next step: {both}")
    return lines


def _next_rates(header: StateHeader, step: int) -> dict[str, float]:
    """Return the learning rate of each part after `step` steps."""
    section = OptimizerSection.model_validate(header.recipe["optimizer"])
    factor = section.rate_factor(step, header.steps)
    rates = {str(part): rate for part, rate in section.part_learning_rates.items()}
    common = section.learning_rate or section.traits.learning_rate
    return {part: rates.get(part, common) * factor for part in header.recipe["model"]["parts"]}


def _common_rate(section: Mapping[str, Any]) -> float:
    rate = section.get("learning_rate")
    return OPTIMIZERS[section.get("name", "adamw")].learning_rate if rate is None else rate


def _shown(key: str, value: Any, recipe: Mapping[str, Any]) -> str:
    if value is None and key.startswith(("optimizer.learning_rate", "optimizer.part_learning_rates")):
        section = recipe.get("optimizer", {})
        is_common = key == "optimizer.learning_rate"
        source = f"the default of {section.get('name', 'adamw')}" if is_common else "optimizer.learning_rate"
        return f"{_common_rate(section):g} ({source})"
    return _value(value)


def _value(value: Any) -> str:
    """Return a value in the spelling of a recipe."""
    return "not set" if value is None else printable(json.dumps(value, ensure_ascii=False))
