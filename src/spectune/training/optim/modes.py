"""Switch between the two sets of weights of a schedule-free optimizer: the trained ones and their average."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer


def set_mode(optimizer: Optimizer, *, training: bool) -> None:
    """Set the parameters of a schedule-free optimizer to the trained weights or to their average."""
    switch = getattr(optimizer, "train" if training else "eval", None)
    if switch is not None:
        switch()


@contextmanager
def finished_weights(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Set the parameters to the weights to save, sample and validate, inside the block.

    Schedule-free optimizers compute the trained weights from the average, with rounding errors. They are
    restored from a copy instead, so that a preview does not change the run.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    trained = [parameter.detach().clone() for parameter in parameters]
    set_mode(optimizer, training=False)
    try:
        yield
    finally:
        set_mode(optimizer, training=True)
        with torch.no_grad():
            for parameter, value in zip(parameters, trained, strict=True):
                parameter.copy_(value)
