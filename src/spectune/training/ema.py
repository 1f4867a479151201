"""An exponential moving average of the trained tensors. It is saved and sampled instead of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spectune.training.optim.modes import restored


class MovingAverage:
    """An exponential moving average in float32, updated once per step.

    average <- decay * average + (1 - decay) * trained. At step n the decay is at most (1 + n) / (10 + n):
    otherwise the zeros at the start of training would dominate the average of a short run.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self._trained = dict(trained)
        self.average = {name: tensor.detach().float().clone() for name, tensor in trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current tensors."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        current = [tensor.detach().float() for tensor in self._trained.values()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)

    def restore(self, average: Mapping[str, Tensor], steps: int) -> None:
        """Continue from a saved average of the same tensors."""
        self.steps = steps
        with torch.no_grad():
            for name, tensor in self.average.items():
                tensor.copy_(average[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Set the parameters to the average inside the block, then restore them bit for bit."""
        with restored(self._trained.values()):
            with torch.no_grad():
                for name, tensor in self._trained.items():
                    tensor.copy_(self.average[name])
            yield
