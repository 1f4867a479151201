"""Callbacks of a run: progress bar, TensorBoard, warnings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from spectune.errors import SpectuneError
from spectune.model.offload import StagedModel


@dataclass(frozen=True)
class RunStart:
    """The facts about a run when its training starts."""

    name: str
    steps: int  # in total, including those before a resume
    first_step: int  # finished steps at the start, above 0 after a resume
    images: int
    trained_parameters: int


@dataclass(frozen=True)
class StepInfo:
    """One finished optimizer step."""

    step: int  # counted from 1
    loss: float  # mean over the step's batches
    learning_rates: Mapping[str, float]  # of each part
    grad_norm: float  # before clipping
    step_size: Mapping[str, float]  # Prodigy's d of each part; empty for other optimizers
    seconds: float
    memory_bytes: int  # peak GPU memory so far, or current main memory of this process
    delta_norms: Mapping[str, float]  # of dA and dB of each part: "unet.down"; empty between logged steps

    @property
    def learning_rate(self) -> float:
        """The largest learning rate of all parts."""
        return max(self.learning_rates.values())


@dataclass(frozen=True)
class TrainReport:
    """The result of a run."""

    steps: int  # finished steps, including those before a resume
    first_step: int  # finished steps when this process started
    seconds: float  # spent in steps
    training_loss: float | None  # mean of the last steps
    validation_before: float | None
    validation_after: float | None
    files: tuple[Path, ...]
    interrupted: bool
    warnings: tuple[str, ...]

    @property
    def steps_per_second(self) -> float | None:
        """Steps of this process per second; None if it made no step."""
        done = self.steps - self.first_step
        return done / self.seconds if done and self.seconds else None


class Callbacks:
    """The methods that a run calls on its main process. The defaults do nothing; override what you need."""

    def on_message(self, text: str) -> None:
        """Receive a log line or a warning."""

    def on_progress(self, stage: str, done: int, total: int) -> None:
        """Receive the progress of a stage before the training. The stage ends when `done` is `total`."""

    def on_start(self, start: RunStart) -> None:
        """Handle the start of training."""

    def on_step(self, info: StepInfo) -> None:
        """Handle a logged step."""

    def on_validation(self, step: int, loss: float) -> None:
        """Receive the validation loss after `step` steps."""

    def on_preview(self, step: int, model: StagedModel) -> Image.Image | None:
        """Return a preview as one image, drawn with `model`; its weights are those that would be saved."""

    def on_picture(self, step: int, sheet: Image.Image) -> None:
        """Receive a finished preview image."""

    def on_save(self, step: int, file: Path) -> None:
        """Handle an adapter file that was just written."""

    def on_end(self, report: TrainReport) -> None:
        """Handle the end of a run. Also called after an interruption or an error."""


class WarningLog:
    """A list of warnings for the report. Each warning is also shown at once."""

    def __init__(self, callbacks: Callbacks) -> None:
        self.callbacks = callbacks
        self.entries: list[str] = []

    def add(self, warnings: Iterable[str]) -> None:
        """Show warnings and keep them for the report."""
        for warning in warnings:
            self.callbacks.on_message(f"warning: {warning}")
            self.entries.append(warning)


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


class TensorBoardLog(Callbacks):
    """A log of scalars and previews for TensorBoard; a resumed run replaces entries after its first step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer = None
        self._before: float | None = None

    def on_start(self, start: RunStart) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise SpectuneError(
                "TensorBoard is not installed",
                hint="pip install tensorboard, or set run.tensorboard = false in the recipe",
            ) from error
        self._writer = SummaryWriter(
            str(self.folder), purge_step=start.first_step + 1 if start.first_step else None
        )
        if self._before is not None:
            self._add("loss/held_out", self._before, start.first_step)

    def on_step(self, info: StepInfo) -> None:
        self._add("loss/train", info.loss, info.step)
        for part, rate in info.learning_rates.items():
            self._add(f"optimizer/learning_rate_{part}", rate, info.step)
        self._add("speed/seconds_per_step", info.seconds, info.step)
        self._add("optimizer/grad_norm", info.grad_norm, info.step)
        for part, size in info.step_size.items():
            self._add(f"optimizer/d_{part}", size, info.step)
        for name, norm in info.delta_norms.items():
            self._add(f"norm/{name}", norm, info.step)
        self._add("speed/memory_bytes", info.memory_bytes, info.step)

    def on_picture(self, step: int, sheet: Image.Image) -> None:
        if self._writer is not None:
            self._writer.add_image("preview", np.asarray(sheet.convert("RGB")), step, dataformats="HWC")

    def on_validation(self, step: int, loss: float) -> None:
        if self._writer is None:
            self._before = loss
        else:
            self._add("loss/held_out", loss, step)

    def on_end(self, report: TrainReport) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, tag: str, value: float, step: int) -> None:
        if self._writer is not None:
            self._writer.add_scalar(tag, value, step)


class CallbackList(Callbacks):
    """Several callbacks as one. A preview that one of them draws goes to `on_picture` of all."""

    def __init__(self, callbacks: Sequence[Callbacks]) -> None:
        self.callbacks = callbacks

    def on_message(self, text: str) -> None:
        for callback in self.callbacks:
            callback.on_message(text)

    def on_progress(self, stage: str, done: int, total: int) -> None:
        for callback in self.callbacks:
            callback.on_progress(stage, done, total)

    def on_start(self, start: RunStart) -> None:
        for callback in self.callbacks:
            callback.on_start(start)

    def on_step(self, info: StepInfo) -> None:
        for callback in self.callbacks:
            callback.on_step(info)

    def on_validation(self, step: int, loss: float) -> None:
        for callback in self.callbacks:
            callback.on_validation(step, loss)

    def on_preview(self, step: int, model: StagedModel) -> Image.Image | None:
        sheet = None
        for callback in self.callbacks:
            drawn = callback.on_preview(step, model)
            if drawn is not None:
                self.on_picture(step, drawn)
                sheet = drawn
        return sheet

    def on_picture(self, step: int, sheet: Image.Image) -> None:
        for callback in self.callbacks:
            callback.on_picture(step, sheet)

    def on_save(self, step: int, file: Path) -> None:
        for callback in self.callbacks:
            callback.on_save(step, file)

    def on_end(self, report: TrainReport) -> None:
        for callback in self.callbacks:
            callback.on_end(report)
