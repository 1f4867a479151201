"""The records of a run: its setup, which does not change, and its progress."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from spectune.core.low_rank import LowRank
from spectune.model.inject import Injection
from spectune.model.network import Sdxl
from spectune.model.offload import Offload
from spectune.training import state
from spectune.training.callbacks import Callbacks
from spectune.training.data.dataset import Batch, Pictures
from spectune.training.data.plan import BatchPlan, PlannedBatches
from spectune.training.denoiser import Denoiser
from spectune.training.ema import MovingAverage
from spectune.training.objective.edm2 import WeightingTrainer
from spectune.training.objective.objective import Objective
from spectune.training.optim.modes import finished_weights
from spectune.training.recipe.recipe import Recipe
from spectune.training.trainable_model import TrainableModel
from spectune.training.validation import ValidationImages

RECENT_STEPS = 20  # for the mean loss in the report


@dataclass(frozen=True)
class RunData:
    """The images of a run and their order."""

    pictures: Pictures
    plan: BatchPlan
    validation: tuple[ValidationImages, ...]
    hash: str  # of the training images, captions and sizes

    def first_batches(self, count: int, device: torch.device) -> Iterator[Batch]:
        """Yield the first batches of the run."""
        for draws in PlannedBatches(self.plan, 0, count):
            yield self.pictures.__getitems__(draws).to(device)


@dataclass(frozen=True)
class RunModel:
    """The model of a run."""

    trainable: TrainableModel
    denoiser: Denoiser
    offload: Offload  # networks that wait in main memory, if the recipe names some

    @property
    def sdxl(self) -> Sdxl:
        """The networks, trained changes included."""
        return self.trainable.sdxl

    @property
    def injection(self) -> Injection:
        """The trained layers."""
        return self.trainable.injection


@dataclass(frozen=True)
class Optimization:
    """What steps on the trained tensors."""

    network: nn.Module  # the denoiser as accelerate wraps it
    parameters: Mapping[str, nn.Parameter]  # by name, in the order of the optimizer
    optimizer: Optimizer
    stepper: Any  # the optimizer as accelerate wraps it
    base_rates: tuple[float, ...]  # of each group, before the schedule
    average: MovingAverage | None = None
    weighting: WeightingTrainer | None = None  # a learned weighting of noise levels


@dataclass(frozen=True)
class Run:
    """Everything that a run works with."""

    recipe: Recipe
    accelerator: Accelerator
    callbacks: Callbacks
    data: RunData
    model: RunModel
    objective: Objective
    optimization: Optimization
    steps: int  # of the whole run
    warnings: tuple[str, ...]  # found during setup

    @property
    def replaced(self) -> Mapping[str, Tensor]:
        """The tensors that replace those of the base, by their names in a checkpoint."""
        conversion = self.objective.conversion
        return {} if conversion is None else conversion.swapped.tensors

    @property
    def preview_model(self) -> Sdxl:
        """The model with the prediction type that it is trained for."""
        return replace(self.model.sdxl, prediction=self.objective.prediction)

    def frames(self) -> dict[str, LowRank] | None:
        """Return the frames by layer if the run split the base itself, else None."""
        return self.model.injection.frames() if self.recipe.model.rank is not None else None

    @contextmanager
    def finished_weights(self) -> Iterator[None]:
        """Give the trained tensors the values to save inside the block.

        These are a moving average, or the averaged weights of a schedule-free optimizer.
        """
        it, factors = self.optimization, self.model.injection.joined_factors
        average = it.average
        parameters = list(it.parameters.values())
        with finished_weights(it.optimizer, parameters) if average is None else average.in_place():
            factors.refresh()
            yield
        factors.refresh()

    def state_header(self, progress: Progress) -> state.StateHeader:
        """Return what identifies this run and its position."""
        return state.StateHeader(
            step=progress.step,
            steps=self.steps,
            position=progress.position,
            recipe=self.recipe.model_dump(mode="json"),
            base_hash=self.model.trainable.provenance.base_hash,
            frame_hash=self.model.trainable.frame_hash,
            data_hash=self.data.hash,
            validation_before=progress.validation_before,
            optimizer_package=state.package_of(self.recipe.optimizer.name),
        )

    def state_extras(self) -> dict[str, Any]:
        """Return what a state holds in addition to the trained tensors and the optimizer."""
        extras: dict[str, Any] = {}
        if self.replaced:
            extras["replaced"] = dict(self.replaced)
        average, weighting = self.optimization.average, self.optimization.weighting
        if average is not None:
            extras["ema"] = {"average": average.average, "steps": average.steps}
        if weighting is not None:
            extras["edm2"] = weighting.state_dict()
        return extras


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0  # finished optimizer steps
    position: int = 0  # batches taken from the plan, by all processes
    first_step: int = 0  # where this process started, above 0 when resumed
    validation_before: float | None = None
    validation_after: float | None = None
    recent_losses: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    seconds: float = 0.0  # spent in steps
    files: list[Path] = field(default_factory=list[Path])
    warnings: list[str] = field(default_factory=list[str])  # found when resuming
