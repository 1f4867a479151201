"""Choose the state to resume from, and save a state after an error."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from spectune.files.rename import rename
from spectune.training import output
from spectune.training.run import Progress, Run
from spectune.training.state import DamagedState, SavedState, load_state


def load_newest(states: Sequence[Path]) -> tuple[SavedState | None, list[DamagedState]]:
    """Return the newest complete state and the errors of newer, damaged ones.

    Args:
        states: State folders, oldest first.

    Raises:
        DamagedState: All states are damaged.
        InputError: A state was edited, or has another format.
    """
    damaged: list[DamagedState] = []
    for folder in reversed(states):
        try:
            return load_state(folder), damaged
        except DamagedState as error:
            damaged.append(error)
    if damaged:
        newest = damaged[0]
        newest.hint = (
            "there is no complete older state; start again with `force` and `overrides` run.resume=false"
        )
        raise newest
    return None, []


def fallback_warnings(damaged: Sequence[DamagedState], saved: SavedState | None) -> list[str]:
    """Return one line for each damaged state that `saved` replaces."""
    if saved is None:
        return []
    return [
        f"{error.what}; resuming from {saved.folder.name} instead, the damaged folder is renamed"
        for error in damaged
    ]


def set_aside(states: Sequence[Path]) -> None:
    """Rename damaged states, so that they do not count as saves of the run."""
    for folder in states:
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        rename(folder, aside)


def save_after_error(run: Run, progress: Progress) -> None:
    """Try to save the state of the last finished step, and report the result.

    Nothing is saved in the middle of a step, from weights that are not finite, or twice.
    """
    optimization = run.optimization
    is_saved = progress.step == progress.first_step or output.has_saved(run, progress)
    if progress.in_step or is_saved or not run.accelerator.is_main_process:
        return
    try:
        if run.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        if not all(bool(torch.isfinite(tensor).all()) for tensor in optimization.parameters.values()):
            return
        output.save_state(run, progress)
        run.callbacks.on_message(
            f"saved the state after step {progress.step}; the same command continues from there"
        )
    except Exception as error:  # the error that stopped the run is the one to report
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        run.callbacks.on_message(f"warning: the state after step {progress.step} was not saved: {reason}")
