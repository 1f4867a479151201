"""What a run tells its observers: records of its events, and the class to override.

console: progress on stderr or in a notebook; screens and status are its parts.
loss_curve: a table and a plot of the losses beside the result.
loss_table: read and write the table.
loss_plot: draw the plot.
trackers: a log for TensorBoard and the other trackers of accelerate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # loading the networks takes seconds, which an error in a recipe must not wait for
    from PIL import Image

    from spectune.model.offload import StagedModel

Request = Literal["stop", "save", "preview"]


@dataclass(frozen=True)
class RunStart:
    """The facts about a run when its training starts."""

    name: str
    steps: int  # in total, including those before a resume
    first_step: int  # finished steps at the start, above 0 after a resume
    images: int
    trained_parameters: int
    captions: tuple[str, ...] = ()  # of the validation images, or of the first 1,000 training images
    output: Path = Path()  # folder of the results


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


class Callbacks:
    """The methods that a run calls on its main process. The defaults do nothing; override what you need."""

    def on_message(self, text: str) -> None:
        """Receive a log line or a warning."""

    def on_progress(self, stage: str, done: int, total: int) -> None:
        """Receive the progress of caching, validation, a preview or a save. It ends with `done` = `total`."""

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

    def on_preview_files(self, step: int, files: Sequence[Path], prompts: Sequence[str]) -> None:
        """Receive the pictures of a preview, one file for each prompt."""

    def on_save(self, step: int, file: Path) -> None:
        """Handle an adapter file that was just written."""

    def on_state(self, step: int, folder: Path) -> None:
        """Handle a state that was just written."""

    def on_end(self, report: TrainReport) -> None:
        """Handle the end of a run. Also called after an interruption or an error."""

    def requests(self) -> frozenset[Request]:
        """Return what to do now, after a step: save and stop, save, or draw a preview."""
        return frozenset()

    def on_request_done(self, request: Request) -> None:
        """Handle that a save or a preview of `requests` is finished. Withdraw the request."""


@contextmanager
def stage(callbacks: Callbacks, name: str) -> Iterator[Callable[[int, int], None]]:
    """Report a stage that lasts as long as the block; yield a function for its progress (done, total)."""

    def report(done: int, total: int) -> None:
        if done < total:  # the block ends the stage, also after an error
            callbacks.on_progress(name, done, total)

    callbacks.on_progress(name, 0, 1)
    try:
        yield report
    finally:
        callbacks.on_progress(name, 1, 1)


class WarningLog:
    """A list of warnings for the report. Each warning is also shown at once."""

    def __init__(self, callbacks: Callbacks) -> None:
        self.callbacks = callbacks
        self.entries: list[str] = []

    def add(self, warnings: Iterable[str]) -> None:
        """Show warnings and keep them for the report, except those that were shown before."""
        for warning in warnings:
            if warning not in self.entries:
                self.callbacks.on_message(f"warning: {warning}")
                self.entries.append(warning)


class CallbackList(Callbacks):
    """Several callbacks as one. A preview that one of them draws goes to `on_picture` of all."""

    def __init__(self, callbacks: Sequence[Callbacks]) -> None:
        self.callbacks = callbacks
        for name in vars(Callbacks):
            if name.startswith("on_") and name != "on_preview":
                setattr(self, name, partial(self._call_all, name))

    def _call_all(self, name: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, name)(*arguments)

    def requests(self) -> frozenset[Request]:
        return frozenset(request for callback in self.callbacks for request in callback.requests())

    def on_preview(self, step: int, model: StagedModel) -> Image.Image | None:
        sheet = None
        for callback in self.callbacks:
            drawn = callback.on_preview(step, model)
            if drawn is not None:
                self.on_picture(step, drawn)
                sheet = drawn
        return sheet
