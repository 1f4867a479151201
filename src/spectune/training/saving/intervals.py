"""What is due after a step: validation, saves and previews by steps or epochs, states by the clock."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Literal

import torch
from accelerate import Accelerator

from spectune.training.recipe.sections.run import RunSection

Task = Literal["save", "validate", "preview"]


def intervals_of(settings: RunSection, task: Task) -> tuple[int | None, int | None]:
    """Return the steps and the epochs between two times of a task; None: that interval is not set."""
    match task:
        case "save":
            return settings.save_every_steps, settings.save_every_epochs
        case "validate":
            return settings.validate_every_steps, settings.validate_every_epochs
        case "preview":
            return settings.preview_every_steps, settings.preview_every_epochs


def is_due(settings: RunSection, task: Task, *, step: int, position: int, span: tuple[int, int]) -> bool:
    """Return whether a task follows a step.

    An epoch ends with the first step that leaves no batch of it. With several batches per step, that step may
    contain batches of the next epoch.

    Args:
        settings: The section [run].
        task: What may follow.
        step: The number of finished steps.
        position: The number of batches that they took from the plan, on all processes.
        span: The number of batches of an epoch, and of a step on all processes.
    """
    steps, epochs = intervals_of(settings, task)
    if steps is not None and step % steps == 0:
        return True
    if epochs is None:
        return False
    batches = epochs * span[0]
    return position // batches > (position - span[1]) // batches


def previews_at_end(settings: RunSection) -> bool:
    """Return whether the end of the run has a preview: prompts are given, but no interval."""
    return settings.preview is not None and intervals_of(settings, "preview") == (None, None)


class SaveClock:
    """Tells when `minutes` have passed since the last save. Never, if `minutes` is 0 or None."""

    def __init__(self, minutes: float | None, *, now: Callable[[], float] = monotonic) -> None:
        self._seconds = 60 * (minutes or 0)
        self._now = now
        self._started = now()

    @property
    def is_due(self) -> bool:
        """Whether it is time for a save."""
        return self._seconds > 0 and self._now() - self._started >= self._seconds

    def restart(self) -> None:
        """Start again, after a save."""
        self._started = self._now()


def agreed(accelerator: Accelerator, *, stop: bool, save: bool) -> tuple[bool, bool]:
    """Return whether all processes stop, and whether all save, after the same step.

    They stop if one of them got a signal. They save if it is time on the main process: clocks differ.
    """
    if accelerator.num_processes == 1:
        return stop, save
    flags = torch.tensor([stop, save and accelerator.is_main_process], device=accelerator.device)
    total: torch.Tensor = accelerator.reduce(flags.float(), reduction="sum")  # pyright: ignore[reportAssignmentType]
    stops, saves = total.tolist()  # one read for both
    return stops > 0, saves > 0
