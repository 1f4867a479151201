"""One training step: forward and backward passes, clipping, learning rates, the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import psutil
import torch
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.model.inject import Injection
from spectune.training.callbacks import StepInfo
from spectune.training.data.dataset import Batch
from spectune.training.optim.groups import learning_rates, step_sizes
from spectune.training.optim.schedules import rate_factor
from spectune.training.run import Run
from spectune.training.seeds import derived_seed


def train_batch(run: Run, batch: Batch, *, step: int) -> tuple[Tensor, Tensor | None]:
    """Accumulate the gradient of one batch; step the optimizer after the last batch of a step.

    `step` is the number of finished steps. Returns the loss and, after the last batch, the gradient norm.
    """
    accelerator, optimization = run.accelerator, run.optimization
    # Dropout uses the global generator. It must depend on the position only, so that a run can resume.
    seed = run.recipe.run.seed
    torch.manual_seed(derived_seed(seed, "step", batch.position))
    grad_norm = None
    with accelerator.accumulate(optimization.network):
        noised, costs = run.objective.image_costs(optimization.network, batch, step=step)
        accelerator.backward(run.objective.cost.of_batch(noised, costs))
        if accelerator.sync_gradients:
            grad_norm = _clip_gradients(run, step)
            _set_learning_rates(run, step)
            # The same seed on every process: stochastic rounding must give the same weights everywhere.
            # "optimiser" is hashed into the seed: another spelling would change every run.
            torch.manual_seed(derived_seed(seed, "optimiser", step))
        optimization.stepper.step()
        optimization.stepper.zero_grad()
    if accelerator.sync_gradients and optimization.weighting is not None:
        optimization.weighting.step(lambda gradient: _mean_of_processes(run, gradient))
    # The reported loss excludes a learned weighting, which changes during the run.
    return costs.detach().mean(), grad_norm


def _mean_of_processes(run: Run, tensor: Tensor) -> Tensor:
    return cast("Tensor", run.accelerator.reduce(tensor, reduction="mean"))


def _clip_gradients(run: Run, step: int) -> Tensor:
    """Clip all gradients and return their norm before clipping; raise SpectuneError if it is not finite."""
    bound = run.recipe.optimizer.max_grad_norm or math.inf  # inf leaves the gradients unchanged
    parameters = list(run.optimization.parameters.values())
    norm = cast("Tensor", run.accelerator.clip_grad_norm_(parameters, bound))
    _check_finite("gradient norm", float(norm), step + 1)
    return norm


def _check_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise SpectuneError(
            f"the {name} of step {step} is {value}; the step was not saved",
            hint="lower the learning rate; the run can resume from its last state",
        )


def _set_learning_rates(run: Run, step: int) -> None:
    settings, optimization = run.recipe.optimizer, run.optimization
    if settings.traits.schedule_free:
        return
    factor = rate_factor(
        settings.schedule,
        step,
        steps=run.steps,
        warmup_steps=settings.warmup_steps,
        cycles=settings.cycles,
        power=settings.power,
        final_share=settings.final_share,
    )
    for group, rate in zip(optimization.optimizer.param_groups, optimization.base_rates, strict=True):
        group["lr"] = rate * factor


def step_info(
    run: Run, step: int, losses: Sequence[Tensor], grad_norm: Tensor, seconds: float, *, norms: bool
) -> StepInfo:
    """Return the record of a finished step.

    Args:
        run: The run.
        step: The number of the step, counted from 1.
        losses: The loss of each batch of the step.
        grad_norm: The gradient norm before clipping.
        seconds: The duration of the step.
        norms: Whether to compute `delta_norms`.

    Raises:
        SpectuneError: The loss is not finite.
    """
    loss = float(_mean_of_processes(run, torch.stack(list(losses)).mean()))
    _check_finite("loss", loss, step)
    return StepInfo(
        step=step,
        loss=loss,
        learning_rates=learning_rates(run.optimization.optimizer),
        grad_norm=float(grad_norm),
        step_size=step_sizes(run.optimization.optimizer),
        seconds=seconds,
        memory_bytes=memory_in_use(run.accelerator.device),
        delta_norms=delta_norms(run.model.injection) if norms else {},
    )


def memory_in_use(device: torch.device) -> int:
    """Return the peak memory of this process on the GPU, or its current main memory, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


@torch.no_grad()
def delta_norms(injection: Injection) -> dict[str, float]:
    """Return the Frobenius norm of all dA (key `unet.down`) and of all dB (key `unet.up`) of each part."""
    groups: dict[str, list[Tensor]] = {}
    for name, layer in injection.layers.items():
        part = name.partition(".")[0]
        down, up = layer.trained_change()
        groups.setdefault(f"{part}.down", []).append(down)
        groups.setdefault(f"{part}.up", []).append(up)
    return {
        name: float(torch.stack([norm.float() for norm in torch._foreach_norm(tensors)]).norm())
        for name, tensors in groups.items()
    }
