"""The disk space of the saves of a run, as far as it is known before the first step."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spectune.adapters.adapter import tensor_infos
from spectune.errors import counted
from spectune.training.memory.optimizer_state import optimizer_bytes
from spectune.training.recipe.sections.run import RunSection
from spectune.training.run import Progress, Run
from spectune.training.saving.intervals import is_due

_FLOAT32 = 4  # bytes; adapters hold deltas in float32


@dataclass(frozen=True)
class SavePlan:
    """The saves that a run keeps, and the bytes of each."""

    adapters: int
    adapter_bytes: int
    states: int
    state_bytes: int

    @classmethod
    def of(cls, settings: RunSection, saves: int, *, adapter_bytes: int, state_bytes: int) -> SavePlan:
        """Return the plan of a run with a number of saves before its end, which is saved too."""
        adapters = saves if settings.keep_last_adapters is None else min(saves, settings.keep_last_adapters)
        by_clock = settings.keep_last if settings.save_every_minutes else 0
        # a new state is complete before the oldest one is removed
        states = min(max(saves, by_clock), settings.keep_last) + 1
        return cls(adapters + 1, adapter_bytes, states, state_bytes)

    @property
    def nbytes(self) -> int:
        """The bytes of all saves together."""
        return self.adapters * self.adapter_bytes + self.states * self.state_bytes

    def __str__(self) -> str:
        states = counted(self.states, "state")
        return (
            f"{counted(self.adapters, 'adapter')} of {shown_size(self.adapter_bytes)} and "
            f"{'up to ' if self.states > 1 else ''}{states} of {shown_size(self.state_bytes)}, "
            f"together {shown_size(self.nbytes)}"
        )


def plan_saves(run: Run, progress: Progress) -> SavePlan:
    """Return the saves from here to the end of the run, with the final ones."""
    saves = sum(
        is_due(
            run.recipe.run,
            "save",
            step=progress.step + number,
            position=progress.position + number * run.batches_per_step,
            span=run.span,
        )
        for number in range(1, run.steps - progress.step)
    )
    return SavePlan.of(
        run.recipe.run, saves, adapter_bytes=_adapter_bytes(run), state_bytes=_state_bytes(run)
    )


def disk_warnings(plan: SavePlan, output: Path) -> list[str]:
    """Return a warning if the disk of the output folder does not hold the saves."""
    free = free_disk(output)
    if plan.nbytes <= free:
        return []
    return [
        f"the saves need {shown_size(plan.nbytes)}, but the disk of {output} has {shown_size(free)} free: "
        "save less often, or set run.keep_last_adapters"
    ]


def free_disk(folder: Path) -> int:
    """Return the free bytes of the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _adapter_bytes(run: Run) -> int:
    if run.refresher is not None:
        return sum(info.nbytes for info in run.refresher.tensors(run.replaced).infos.values())
    deltas = _FLOAT32 * _numel(run.model.injection.parameters())
    return _frame_bytes(run) + deltas + sum(info.nbytes for info in tensor_infos(run.replaced).values())


def _state_bytes(run: Run) -> int:
    trained = list(run.optimization.parameters.values())
    frames = _frame_bytes(run) if run.recipe.model.frame_rank is not None else 0
    average = 0 if run.optimization.average is None else _nbytes(run.optimization.average.average.values())
    model = run.recipe.model
    # a state belongs to float32 copies of tensors that are stepped one by one
    stepped = trained if run.optimization.tensor_steps is None else [_as_float32(p) for p in trained]
    optimizer = optimizer_bytes(
        run.recipe.optimizer.name,
        stepped,
        from_zero=model.form == "delta" and model.start is None and not model.is_full,
    )
    whole = _nbytes(run.swapped.values()) + (0 if run.refresher is None else run.refresher.state_bytes)
    return _nbytes(trained) + optimizer + frames + average + whole


def _as_float32(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, device="meta")


def _frame_bytes(run: Run) -> int:
    layers = run.model.injection.layers.values()
    return _nbytes(tensor for layer in layers for tensor in (layer.frame_down, layer.frame_up))


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def shown_size(nbytes: int) -> str:
    """Return a number of bytes in MB or GB."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
