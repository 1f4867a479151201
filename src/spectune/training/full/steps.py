"""Decide whether the optimizer steps in the backward pass, and say what the other way costs."""

from __future__ import annotations

from collections.abc import Mapping

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from spectune.errors import InputError
from spectune.training.callbacks import Callbacks
from spectune.training.optim.tensorwise import TensorSteps
from spectune.training.recipe.recipe import Recipe


def tensor_steps(
    recipe: Recipe,
    optimizer: Optimizer,
    parameters: Mapping[str, nn.Parameter],
    accelerator: Accelerator,
    callbacks: Callbacks,
) -> TensorSteps | None:
    """Return the steps of a full fine-tuning; None if its optimizer needs all gradients at once.

    Raises InputError if the recipe asks for steps in the backward pass on several processes.
    """
    if not recipe.model.is_full:
        return None
    obstacle, wanted = recipe.backward_obstacle, recipe.optimizer.step_in_backward
    if (processes := accelerator.num_processes) > 1:
        obstacle = f"{processes} processes, which average their gradients: train on one"
        if wanted:
            raise InputError(
                f"optimizer.step_in_backward = true does not work with {obstacle}",
                hint="remove optimizer.step_in_backward",
            )
    in_backward = not obstacle and wanted is not False
    nbytes = sum(parameter.nbytes for parameter in parameters.values())
    if in_backward:
        callbacks.on_message(f"the optimizer steps in the backward pass: no {_size(nbytes)} of gradients")
    else:
        why = obstacle or "optimizer.step_in_backward = false"
        callbacks.on_message(f"gradients take {_size(nbytes)}: no step in the backward pass with {why}")
    if not recipe.optimizer.traits.tensorwise:
        return None
    return TensorSteps(optimizer, parameters, seed=recipe.run.seed, in_backward=in_backward)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
