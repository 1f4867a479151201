"""The two sets of weights of a schedule-free optimizer: the trained ones and their average."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer


def set_mode(optimizer: Optimizer, *, training: bool) -> None:
    """Put the weights that a schedule-free optimizer trains into the parameters, or their average."""
    switch = getattr(optimizer, "train" if training else "eval", None)
    if switch is not None:
        switch()


@contextmanager
def finished_weights(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Put the weights to save, sample and validate into the parameters for the duration of the block.

    Schedule-free optimizers cannot restore the training weights exactly in floating point. They are restored
    from a copy: a look at a run does not change it.
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
