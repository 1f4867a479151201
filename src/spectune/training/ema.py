"""An exponential moving average of the trained tensors, which is saved and sampled in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """average <- decay * average + (1 - decay) * trained, once a step, in float32.

    The decay grows like (1 + n) / (10 + n) with the step n up to its final value. Without that, the zeros
    that training starts from would stay in the average of a short run.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self._trained = dict(trained)
        self.average = {name: tensor.detach().float().clone() for name, tensor in trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Add the current tensors to the average."""
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
        """Give the parameters the average inside the block; afterwards restore them bit for bit."""
        kept = {name: tensor.detach().clone() for name, tensor in self._trained.items()}
        with torch.no_grad():
            for name, tensor in self._trained.items():
                tensor.copy_(self.average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self._trained.items():
                    tensor.copy_(kept[name])
