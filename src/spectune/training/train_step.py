"""One training step: forward and backward passes, clipping, learning rates, the optimizer's step."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import cast

import psutil
import torch
from torch import Tensor

from spectune.errors import SpectuneError
from spectune.model.device import tf32_products
from spectune.model.inject import Injection
from spectune.training.callbacks import StepInfo
from spectune.training.data.dataset import Batch
from spectune.training.optim.groups import learning_rates, step_sizes
from spectune.training.resume.divergence import NotFinite
from spectune.training.run import Progress, Run
from spectune.training.seeds import derived_seed


def train_batch(run: Run, batch: Batch, progress: Progress) -> tuple[Tensor, Tensor | None]:
    """Accumulate the gradient of one batch; step the optimizer after the last batch of a step.

    Returns the loss with the size of the batch relative to a full one, (2,) float32, and, after the last
    batch, the gradient norm. `progress.in_step` is then set. Images of partial batches weigh no more than
    others.
    """
    accelerator, optimization, step = run.accelerator, run.optimization, progress.step
    # Dropout uses the global generator. It must depend on the position only, so that a run can resume.
    seed = run.recipe.run.seed
    torch.manual_seed(derived_seed(seed, "step", batch.position))
    grad_norm = None
    share = len(batch) / run.data.plan.batch
    with accelerator.accumulate(optimization.network), tf32_products(accelerator.device):
        noised, costs = run.objective.image_costs(optimization.network, batch, step=step)
        cost = optimization.scaler.scale(run.objective.cost.of_batch(noised, costs, share=share))
        if optimization.tensor_steps is not None and optimization.tensor_steps.in_backward:
            grad_norm = _step_in_backward(run, cost, progress)
        else:
            accelerator.backward(cost)
        if accelerator.sync_gradients and grad_norm is None:
            optimization.scaler.unscale_(optimization.optimizer)
            grad_norm = _clip_gradients(run)
            _set_learning_rates(run, step)
            # The same seed on every process: stochastic rounding must give the same weights everywhere.
            # "optimiser" is hashed into the seed: another spelling would change every run.
            torch.manual_seed(derived_seed(seed, "optimiser", step))
            progress.in_step = True  # an error from here on leaves weights that belong to no step
            if optimization.tensor_steps is not None:
                optimization.tensor_steps.begin(step)
                optimization.tensor_steps.step_all()
            else:
                # With a scaler, gradients that are not finite skip the step.
                optimization.scaler.step(optimization.optimizer)
        optimization.stepper.zero_grad()
    if accelerator.sync_gradients:
        if optimization.weighting is not None:
            optimization.scaler.unscale_(optimization.weighting.optimizer)
            optimization.weighting.step(lambda gradient: _mean_of_processes(run, gradient))
        optimization.scaler.update()
    # The reported loss excludes a learned weighting, which changes during the run.
    loss = costs.detach().float().mean()
    return torch.stack([loss, torch.full_like(loss, share)]), grad_norm


def _step_in_backward(run: Run, cost: Tensor, progress: Progress) -> Tensor:
    """Run the backward pass, in which each tensor is stepped; return the gradient norm."""
    steps = run.optimization.tensor_steps
    assert steps is not None
    _set_learning_rates(run, progress.step)
    steps.begin(progress.step)
    progress.in_step = True  # an error from here on leaves weights that belong to no step
    run.accelerator.backward(cost)
    return steps.norm()


def _mean_loss(run: Run, losses: Tensor) -> Tensor:
    """Return the mean over all images of a step.

    `losses` (batches, 2) are the loss and the relative size of each batch.
    """
    loss, share = losses.unbind(1)
    total, count = _mean_of_processes(run, torch.stack([(loss * share).sum(), share.sum()]))
    return total / count


def _mean_of_processes(run: Run, tensor: Tensor) -> Tensor:
    return cast("Tensor", run.accelerator.reduce(tensor, reduction="mean"))


def _clip_gradients(run: Run) -> Tensor:
    """Clip all gradients and return their norm before clipping."""
    bound = run.recipe.optimizer.max_grad_norm or math.inf  # inf leaves the gradients unchanged
    parameters = list(run.optimization.parameters.values())
    return cast("Tensor", run.accelerator.clip_grad_norm_(parameters, bound))


def _set_learning_rates(run: Run, step: int) -> None:
    settings, optimization = run.recipe.optimizer, run.optimization
    if settings.traits.schedule_free:
        return
    factor = settings.rate_factor(step, run.steps)
    if run.refresher is not None:
        factor *= run.refresher.rate_factor(step)
    for group, rate in zip(optimization.optimizer.param_groups, optimization.base_rates, strict=True):
        group["lr"] = rate * factor


def step_info(
    run: Run, step: int, losses: Sequence[Tensor], grad_norm: Tensor, started: float, *, norms: bool
) -> StepInfo:
    """Return the record of a finished step. All values are read from the device at once.

    Args:
        run: The run.
        step: The number of the step, counted from 1.
        losses: The loss and the relative size of each batch of the step, each (2,).
        grad_norm: The gradient norm before clipping.
        started: The time when the step began, of `time.perf_counter`.
        norms: Whether to compute `delta_norms`.

    Raises:
        NotFinite: The loss or the gradient norm is not finite.
    """
    optimization = run.optimization
    sizes = step_sizes(optimization.optimizer)
    values = {
        "loss": _mean_loss(run, torch.stack(list(losses))),
        "norm": grad_norm,
        **{f"size {part}": size for part, size in sizes.items()},
        **(delta_norms(run.model.injection) if norms else {}),
    }
    read = _read(values)
    loss, norm = read.pop("loss"), read.pop("norm")
    if not optimization.scaler.is_enabled():
        _check_finite("gradient norm", norm, step)
    elif not math.isfinite(norm):
        _check_scale(optimization.scaler.get_scale(), step)
    _check_finite("loss", loss, step)
    return StepInfo(
        step=step,
        loss=loss,
        learning_rates=learning_rates(optimization.optimizer),
        grad_norm=norm,
        step_size={part: read.pop(f"size {part}") for part in sizes},
        seconds=time.perf_counter() - started,
        memory_bytes=memory_in_use(run.accelerator.device),
        delta_norms=read,
    )


def _read(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Return values as floats; those on a GPU need one wait for all of them."""
    tensors = {name: value.float() for name, value in values.items() if isinstance(value, Tensor)}
    read = dict(zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True))
    return {name: read[name] if name in read else float(values[name]) for name in values}


def _check_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise NotFinite(f"the {name} of step {step} is {value}; the step was not saved")


def _check_scale(scale: float, step: int) -> None:
    """Raise SpectuneError if gradients overflow although the loss is not scaled up anymore."""
    if scale < 1:
        raise SpectuneError(
            f"the gradients of step {step} overflow in fp16 even without a loss scale",
            hint='set run.precision = "bf16" or "fp32"',
        )


def memory_in_use(device: torch.device) -> int:
    """Return the peak memory of this process on the GPU, or its current main memory, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


@torch.no_grad()
def delta_norms(injection: Injection) -> dict[str, Tensor]:
    """Return the Frobenius norm of all dA (key `unet.down`) and of all dB (key `unet.up`) of each part."""
    groups: dict[str, list[Tensor]] = {}
    for name, layer in injection.layers.items():
        part = name.partition(".")[0]
        down, up = layer.trained_change()
        groups.setdefault(f"{part}.down", []).append(down)
        groups.setdefault(f"{part}.up", []).append(up)
    return {
        name: torch.stack([norm.float() for norm in torch._foreach_norm(tensors)]).norm()
        for name, tensors in groups.items()
    }
