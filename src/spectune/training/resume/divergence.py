"""What to do after a run whose loss or weights are not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from statistics import median

from spectune.errors import SpectuneError
from spectune.training.optim.kinds import OPTIMIZERS
from spectune.training.recipe.recipe import Recipe

# A single loss can be ten times the usual one, because it depends on the noise level.
_BROKEN_LOSS = 30.0  # times the median of the losses before

# For optimizers that find their own step size: an option that makes steps smaller
_CALMER = {
    "dadapt_adam": "growth_rate=1.02",
    "prodigy": "d_coef=0.3",
    "prodigy_plus_schedule_free": "d_coef=0.3",
    "adafactor": "clip_threshold=0.1",  # with relative_step
}
_START_AGAIN = "`force` `overrides` run.resume=false"


class NotFinite(SpectuneError):
    """The loss, the gradient or the trained changes are not finite. The run adds the hint."""


def sound_states(states: Sequence[Path], losses: Mapping[int, float], failed_step: int) -> list[Path]:
    """Return the states from which a run with smaller steps can continue.

    Args:
        states: State folders, oldest first.
        losses: The loss of each step of this process. The loss of a step measures the weights before it.
        failed_step: The step that was not finite.
    """
    return list(takewhile(lambda path: not _is_broken(_step_of(path), losses, failed_step), states))


def _is_broken(step: int, losses: Mapping[int, float], failed_step: int) -> bool:
    if step >= failed_step - 1:
        return True
    before = [loss for other, loss in losses.items() if other <= step]
    return step + 1 in losses and bool(before) and losses[step + 1] > _BROKEN_LOSS * median(before)


def _step_of(state: Path) -> int:
    return int(state.stem.rpartition("-step")[2])


def divergence_hint(recipe: Recipe, states: Sequence[Path], sound: Sequence[Path]) -> str:
    """Return what to change, and how to continue from the newest of the `sound` states."""
    section = recipe.optimizer
    if section.traits.fixed_learning_rate is not None:
        again = f"{_START_AGAIN} " if states else ""
        return (
            f"{section.name} finds its own step size, which a resumed run keeps: start again with smaller "
            f"steps; run the same command with {again}`overrides` optimizer.options.{_CALMER[section.name]}"
        )
    common = section.learning_rate or OPTIMIZERS[section.name].learning_rate
    lower = [f"`overrides` optimizer.learning_rate={common / 10:g}"]
    for part, rate in section.part_learning_rates.items():
        lower.append(f"`overrides` optimizer.part_learning_rates.{part}={rate / 10:g}")
    run = f"run the same command with a lower learning rate (it was {common:g}): {' '.join(lower)}"
    if not states:
        return f"{run}; there is no saved state, so the run starts again"
    if not sound:
        return f"{run} {_START_AGAIN}; the run starts again, because the saved states have broken weights too"
    broken = [path.name for path in states if path not in sound]
    removal = f"first remove {' and '.join(broken)}, which have broken weights; " if broken else ""
    return f"{removal}{run}; it resumes from {sound[-1].name}"
