"""A progress bar on stderr."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from spectune.training.callbacks import Callbacks, RunStart, StepInfo, TrainReport


class ConsoleProgress(Callbacks):
    """A progress bar on stderr with loss, speed and remaining time."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._stage_bar: Progress | None = None
        self._task = TaskID(0)
        self._loss: float | None = None
        self._validation = ""

    def on_message(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def on_progress(self, stage: str, done: int, total: int) -> None:
        if done >= total:
            if self._stage_bar is not None:
                self._stage_bar.stop()
            self._stage_bar = None
            return
        if self._stage_bar is None:
            self._stage_bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._stage_bar.add_task(stage, total=total)
            self._stage_bar.start()
        self._stage_bar.update(self._stage_bar.task_ids[0], completed=done)

    def on_start(self, start: RunStart) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=self.console,
        )
        self._task = self._bar.add_task(
            start.name, total=start.steps, completed=start.first_step, rate="", loss=""
        )
        self._bar.start()

    def on_step(self, info: StepInfo) -> None:
        if self._bar is None:
            return
        self._loss = info.loss if self._loss is None else 0.95 * self._loss + 0.05 * info.loss
        self._bar.update(
            self._task,
            completed=info.step,
            rate=f"{1 / info.seconds:.2f} it/s" if info.seconds else "",
            loss=f"loss {self._loss:.4f}{self._validation} {info.memory_bytes / 1e9:.1f} GB",
        )

    def on_validation(self, step: int, loss: float) -> None:
        self._validation = f" validation {loss:.4f}"
        if self._bar is None:
            self.on_message(f"validation loss before training: {loss:.4f}")

    def on_end(self, report: TrainReport) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
