"""Switch between the two sets of weights of a schedule-free optimizer: the trained ones and their average."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer


def set_mode(optimizer: Optimizer, *, training: bool) -> None:
    """Set the parameters of a schedule-free optimizer to the trained weights or to their average."""
    switch = getattr(optimizer, "train" if training else "eval", None)
    if switch is not None:
        switch()


@contextmanager
def restored(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Restore the values of parameters after the block, bit for bit."""
    before = [(parameter, parameter.detach().clone()) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)


@contextmanager
def finished_weights(optimizer: Optimizer, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Set the parameters to the weights to save, sample and validate, inside the block.

    Schedule-free optimizers compute the trained weights from the average, with rounding errors. They are
    restored from a copy instead, so that a preview does not change the run.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    with restored(parameters):
        set_mode(optimizer, training=False)
        try:
            yield
        finally:
            set_mode(optimizer, training=True)
