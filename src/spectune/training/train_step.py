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
    """Add the gradient of one batch; step the optimizer after the last batch of a step.

    `step` counts finished steps. Returns the loss, and the gradient norm after the last batch.
    """
    accelerator, it = run.accelerator, run.optimization
    # Other uses of the global generator (dropout, stochastic rounding) follow the position too.
    seed = run.recipe.run.seed
    torch.manual_seed(derived_seed(seed, "step", batch.position))
    grad_norm = None
    with accelerator.accumulate(it.network):
        noised, costs = run.objective.image_costs(it.network, batch, step=step)
        accelerator.backward(run.objective.cost.of_batch(noised, costs))
        if accelerator.sync_gradients:
            grad_norm = _clip_gradients(run, step)
            _set_learning_rates(run, step)
            # The same on every process: stochastic rounding must not make their copies differ. The purpose is
            # part of the seed: another spelling would change every run.
            torch.manual_seed(derived_seed(seed, "optimiser", step))
        it.stepper.step()
        it.stepper.zero_grad()
    if accelerator.sync_gradients and it.weighting is not None:
        it.weighting.step(lambda gradient: _mean_of_processes(run, gradient))
    # without a learned weighting: its part depends on the weighting, not on the images
    return costs.detach().mean(), grad_norm


def _mean_of_processes(run: Run, tensor: Tensor) -> Tensor:
    return cast("Tensor", run.accelerator.reduce(tensor, reduction="mean"))


def _clip_gradients(run: Run, step: int) -> Tensor:
    """Clip all gradients; return their norm before. Raises SpectuneError if it is not finite."""
    bound = run.recipe.optimizer.max_grad_norm or math.inf  # inf leaves the gradients unchanged
    parameters = list(run.optimization.parameters.values())
    norm = cast("Tensor", run.accelerator.clip_grad_norm_(parameters, bound))
    _check_finite("gradient norm", float(norm), step + 1)
    return norm


def _check_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise SpectuneError(
            f"the {name} of step {step} is {value}: nothing of this step is saved",
            hint="lower the learning rate; the run can resume from its last state",
        )


def _set_learning_rates(run: Run, step: int) -> None:
    settings, it = run.recipe.optimizer, run.optimization
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
    for group, rate in zip(it.optimizer.param_groups, it.base_rates, strict=True):
        group["lr"] = rate * factor


def step_info(
    run: Run, step: int, losses: Sequence[Tensor], grad_norm: Tensor, seconds: float, *, norms: bool
) -> StepInfo:
    """Describe a finished step; raises SpectuneError if its loss is not finite.

    `losses` are those of its batches, `norms` requests `delta_norms`.
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
    """Return the Frobenius norm of all dA ("down") and all dB ("up") of each part, as `unet.down`."""
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
