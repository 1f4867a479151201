"""The records of a run: its setup, which does not change, and its progress."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from spectune.core.low_rank import LowRank
from spectune.model.inject import Injection
from spectune.model.network import Sdxl
from spectune.model.offload import Offload, StagedModel
from spectune.training import state
from spectune.training.callbacks import Callbacks, WarningLog
from spectune.training.data.dataset import Batch, Pictures
from spectune.training.data.plan import BatchPlan, PlannedBatches
from spectune.training.denoiser import Denoiser
from spectune.training.ema import MovingAverage
from spectune.training.frames.making import hash_of_frames
from spectune.training.frames.refresh import Refresher
from spectune.training.full.whole_tensors import without_trained
from spectune.training.objective.edm2 import WeightingTrainer
from spectune.training.objective.objective import Objective
from spectune.training.optim.modes import finished_weights
from spectune.training.optim.tensorwise import TensorSteps
from spectune.training.recipe.recipe import Recipe
from spectune.training.trainable_model import TrainableModel
from spectune.training.validation import ValidationImages

LISTED_CAPTIONS = 1_000  # of the training images, for previews
RECENT_STEPS = 20  # for the mean loss in the report


@dataclass(frozen=True)
class RunData:
    """The images of a run and their order."""

    pictures: Pictures
    plan: BatchPlan
    validation: tuple[ValidationImages, ...]
    hash: str  # of the training images, captions and sizes

    @property
    def captions(self) -> tuple[str, ...]:
        """The different captions of the validation images, or else of the first training images."""
        validation = [caption for group in self.validation for caption in group.captions]
        first = islice(self.pictures.images, LISTED_CAPTIONS)
        return tuple(dict.fromkeys(validation or [image.caption for image in first]))

    def first_batches(self, count: int, device: torch.device) -> Iterator[Batch]:
        """Yield the first `count` batches of the run."""
        for draws in PlannedBatches(self.plan, 0, count):
            yield self.pictures.__getitems__(draws).to(device)


@dataclass(frozen=True)
class RunModel:
    """The model of a run."""

    trainable: TrainableModel
    denoiser: Denoiser
    offload: Offload  # of the networks in run.offload

    @property
    def sdxl(self) -> Sdxl:
        """The networks, including the trained changes."""
        return self.trainable.sdxl

    @property
    def injection(self) -> Injection:
        """The trained layers."""
        return self.trainable.injection


@dataclass(frozen=True)
class Optimization:
    """The optimizer of a run, with everything else that changes at each step."""

    network: nn.Module  # the denoiser, wrapped by accelerate
    parameters: Mapping[str, nn.Parameter]  # by name, in the order of the optimizer
    optimizer: Optimizer
    stepper: Any  # the optimizer, wrapped by accelerate
    base_rates: tuple[float, ...]  # of each group, before the schedule
    scaler: GradScaler  # of the loss; disabled unless the precision is fp16
    average: MovingAverage | None = None
    weighting: WeightingTrainer | None = None  # a learned weighting of noise levels
    tensor_steps: TensorSteps | None = None  # of a full fine-tuning, one tensor at a time


@dataclass(frozen=True)
class Run:
    """The setup of a run: recipe, data, model, objective and optimizer."""

    recipe: Recipe
    accelerator: Accelerator
    callbacks: Callbacks
    data: RunData
    model: RunModel
    objective: Objective
    optimization: Optimization
    steps: int  # in total, including those before a resume
    warnings: WarningLog
    refresher: Refresher | None = None

    @property
    def batches_per_step(self) -> int:
        """The batches of one optimizer step, on all processes."""
        return self.recipe.run.accumulation * self.accelerator.num_processes

    @property
    def span(self) -> tuple[int, int]:
        """The number of batches of an epoch, and of a step on all processes."""
        return self.data.plan.batches_per_epoch, self.batches_per_step

    @property
    def replaced(self) -> Mapping[str, Tensor]:
        """The tensors that replace tensors of the base, by their names in a checkpoint; read on access."""
        whole = self.model.trainable.whole
        return self.swapped if whole is None else whole.values(self.swapped)

    @property
    def swapped(self) -> Mapping[str, Tensor]:
        """The tensors of a warm start that are not trained, by their names in a checkpoint."""
        conversion = self.objective.conversion
        tensors = {} if conversion is None else conversion.swapped.tensors
        return without_trained(tensors, self.model.trainable.whole)

    @property
    def complete_tensors(self) -> Mapping[str, Tensor]:
        """The tensors that an adapter of this run stores completely, by their names in a checkpoint."""
        return self.replaced if self.refresher is None else self.refresher.tensors(self.replaced)

    @property
    def frame_hash(self) -> str:
        """The hash of the current frames."""
        if self.refresher is None:
            return self.model.trainable.frame_hash
        return hash_of_frames(self.model.injection.frames())

    @property
    def preview_model(self) -> StagedModel:
        """The model with the prediction type of the training, ready to draw previews."""
        return StagedModel(
            replace(self.model.sdxl, prediction=self.objective.prediction),
            networks=self.model.offload,
            encoded=self.model.denoiser.text or {},
            notify=self.callbacks.on_message,
        )

    def frames(self) -> dict[str, LowRank] | None:
        """Return the frame of each layer, or None if the frames come from a principal file."""
        return self.model.injection.frames() if self.recipe.model.frame_rank is not None else None

    @contextmanager
    def finished_weights(self) -> Iterator[None]:
        """Set the trained tensors to the values to save, inside the block.

        These are the moving average or the average of a schedule-free optimizer, if the run has one.
        """
        optimization, factors = self.optimization, self.model.injection.joined_factors
        if optimization.average is not None:
            swapped = optimization.average.in_place()
        else:
            swapped = finished_weights(optimization.optimizer, optimization.parameters.values())
        try:
            with swapped:
                factors.refresh()
                yield
        finally:
            factors.refresh()

    def state_header(self, progress: Progress) -> state.StateHeader:
        """Return the header of a saved state: the identity and the position of this run."""
        return state.StateHeader(
            step=progress.step,
            steps=self.steps,
            position=progress.position,
            recipe=self.recipe.model_dump(mode="json"),
            base_hash=self.model.trainable.provenance.base_hash,
            frame_hash=self.frame_hash,
            data_hash=self.data.hash,
            images=len(self.data.pictures),
            batches_per_step=self.batches_per_step,
            validation_before=progress.validation_before,
            optimizer_package=state.package_of(self.recipe.optimizer.name),
            changes=progress.changes,
        )

    def state_extras(self) -> dict[str, Any]:
        """Return the data of a saved state that is not in its trained tensors, optimizer or frames."""
        extras: dict[str, Any] = {}
        if self.refresher is not None and self.refresher.has_folded:
            extras["refresh"] = self.refresher.state()
        if self.swapped:
            extras["replaced"] = dict(self.swapped)
        average, weighting = self.optimization.average, self.optimization.weighting
        if average is not None:
            extras["ema"] = {"average": average.average, "steps": average.steps}
        if weighting is not None:
            extras["edm2"] = weighting.state_dict()
        if self.optimization.scaler.is_enabled():
            extras["scaler"] = self.optimization.scaler.state_dict()
        return extras


@dataclass
class Progress:
    """The progress of a run."""

    step: int = 0  # finished optimizer steps
    position: int = 0  # batches taken from the plan, by all processes
    first_step: int = 0  # finished steps when this process started, above 0 after a resume
    validation_before: float | None = None
    validation_after: float | None = None
    losses: dict[int, float] = field(default_factory=dict[int, float])  # of each step of this process
    seconds: float = 0.0  # spent in steps
    changes: tuple[Mapping[str, Any], ...] = ()  # of the recipe, at each resume
    in_step: bool = False  # the weights are between two steps, or broken: they must not be saved
    skipped_steps: int = 0  # because gradients overflowed in fp16, since this process started
    files: list[Path] = field(default_factory=list[Path])
