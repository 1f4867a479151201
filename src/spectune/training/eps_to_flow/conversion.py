"""Turning an EPS model into a flow model: what the network is asked, how it is read, and where it starts.

The model as it was is the network with its trained changes switched off, so a teacher costs no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from spectune.model.inject import Injection
from spectune.training.eps_to_flow.bridge import Bridge, Reading, between, raw
from spectune.training.eps_to_flow.warm_start import WarmStart
from spectune.training.objective.target import Question

# The teacher fades out on the way to the end of its schedule, s = 0.936: it says less and less there.
TEACHER_FADES_FROM = 0.9

Network = Callable[[Tensor, Tensor, Sequence[str], Tensor], Tensor]  # noised, timestep, captions, time ids


@dataclass(frozen=True)
class Conversion:
    """How a run converts its base.

    With `teaches`, the target is the velocity of the model as it was. For `bridge_steps` steps the network is
    read through the bridge, which fades to the reading of a flow model. `warm` replaces tensors.
    """

    teaches: bool = False
    bridge_steps: int = 0
    bridge: Bridge = field(default_factory=Bridge)
    warm: WarmStart = field(default_factory=WarmStart)

    def reading(self, levels: Tensor, step: int) -> Reading:
        """How the network is read after `step` finished steps."""
        if step >= self.bridge_steps:
            return raw(levels)
        return between(self.bridge.at(levels), raw(levels), step / self.bridge_steps)

    def answer(
        self, network: Network, question: Question, captions: Sequence[str], time_ids: Tensor, *, step: int
    ) -> Tensor:
        """The velocity (batch, channels, h, w) that the network gives, read as after `step` steps."""
        reading = self.reading(question.times, step)
        output = network(reading.feed(question.noised), reading.timestep, captions, time_ids)
        return reading.velocity(output, question.noised)

    def taught(
        self,
        question: Question,
        network: Network,
        injection: Injection,
        captions: Sequence[str],
        time_ids: Tensor,
    ) -> Question:
        """The question with the teacher's velocity for target, the data's where it does not reach."""
        share = self.teacher_share(question.times).to(question.target).view(-1, 1, 1, 1)
        velocity = self.original(question, network, injection, captions, time_ids)
        return replace(question, target=torch.lerp(question.target, velocity, share))

    def teacher_share(self, levels: Tensor) -> Tensor:
        """1 up to TEACHER_FADES_FROM, 0 from the end of the schedule, straight between."""
        end = self.bridge.highest
        return ((end - levels) / (end - TEACHER_FADES_FROM)).clamp(0, 1)

    @torch.no_grad()
    def original(
        self,
        question: Question,
        network: Network,
        injection: Injection,
        captions: Sequence[str],
        time_ids: Tensor,
    ) -> Tensor:
        """The velocity that the model as it was gives for x_flow, through the exact bridge."""
        reading = self.bridge.at(question.times)
        with self.as_it_was(injection):
            output = network(reading.feed(question.noised), reading.timestep, captions, time_ids)
        return reading.velocity(output, question.noised)

    @contextmanager
    def as_it_was(self, injection: Injection) -> Iterator[None]:
        """Within, the network is the model that the run began with."""
        with injection.switched_off(), self.warm.undone():
            yield
