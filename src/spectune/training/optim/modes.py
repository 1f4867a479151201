"""The two sets of weights of a schedule-free optimiser: those it steps on and those it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer


def set_mode(optimizer: Optimizer, *, training: bool) -> None:
    """Switch a schedule-free optimiser between the weights it steps on and those it stands for."""
    switch = getattr(optimizer, "train" if training else "eval", None)
    if switch is not None:
        switch()


@contextmanager
def finished_weights(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within, the parameters hold what should be saved, sampled and validated.

    A schedule-free optimiser's way back is not exact in floating point, so the training weights are
    put back from a copy: looking at a run does not change it.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    kept = [parameter.detach().clone() for parameter in parameters]
    set_mode(optimizer, training=False)
    try:
        yield
    finally:
        set_mode(optimizer, training=True)
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
