"""The progress of a run in a terminal, a notebook or a log file."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from rich.console import Console

from spectune.errors import one_line
from spectune.training.callbacks import Callbacks, RunStart, StepInfo, TrainReport
from spectune.training.callbacks.screens import Screen, screen_for
from spectune.training.callbacks.status import Stage, Status

_MEMORY = 0.95  # of the averages of loss and speed, per logged step


class ConsoleProgress(Callbacks):
    """A line on stderr with step, remaining time, loss and speed, or with the stage that is running.

    A terminal has a bar, a log file gets a line every 30 seconds, a notebook one line that is replaced.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        screen: Screen | None = None,
        now: Callable[[], float] = monotonic,
    ) -> None:
        self._screen = screen or screen_for(console or Console(stderr=True))
        self._status, self._now = Status(), now
        self._stage_began = 0.0

    def on_message(self, text: str) -> None:
        self._screen.message(one_line(text))

    def on_progress(self, stage: str, done: int, total: int) -> None:
        status = self._status
        if done >= total:
            status.stage = None
            if status.steps:
                self._screen.update(status)
            else:
                self._screen.close(keep=False)
            return
        if status.stage is None or status.stage.name != stage:
            self._stage_began = self._now()
        status.stage = Stage(stage, done, total, seconds=self._now() - self._stage_began)
        self._screen.update(status)

    def on_start(self, start: RunStart) -> None:
        status = self._status
        status.name, status.step, status.steps = start.name, start.first_step, start.steps
        if status.steps:
            self._screen.update(status)

    def on_step(self, info: StepInfo) -> None:
        status = self._status
        status.step, status.memory_bytes = info.step, info.memory_bytes
        status.loss = _averaged(status.loss, info.loss)
        status.seconds_per_step = _averaged(status.seconds_per_step, info.seconds)
        self._screen.update(status)

    def on_validation(self, step: int, loss: float) -> None:
        self._status.validation = loss
        if not self._status.steps:
            self.on_message(f"validation loss before training: {loss:.4f}")

    def on_end(self, report: TrainReport) -> None:
        self._status.stage = None
        self._screen.close(keep=self._status.steps > 0)
        self._status = Status()


def _averaged(average: float | None, value: float) -> float:
    return value if average is None else _MEMORY * average + (1 - _MEMORY) * value
