"""The events of a training, and the flag files that it obeys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spectune.cli.job import FLAGS, Job
from spectune.training.callbacks import Callbacks, Request, RunStart, StepInfo


class TrainingEvents(Callbacks):
    """Writes the events of a run to a job folder, and reads its flag files after each step.

    Before the first step there is nothing to save: the flag `stop` then has the effect of Ctrl-C.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._is_training = False

    def on_message(self, text: str) -> None:
        self._job.message(text)

    def on_progress(self, stage: str, done: int, total: int) -> None:
        if not self._is_training and done < total:  # the end of a stage may follow an error
            self._job.check_stop()
        self._job.progress(done, total, stage, stage=stage)

    def on_start(self, start: RunStart) -> None:
        self._is_training = True
        self._job.write(
            "run",
            name=start.name,
            steps=start.steps,
            first_step=start.first_step,
            images=start.images,
            trained_parameters=start.trained_parameters,
            output=start.output.absolute(),
        )

    def on_step(self, info: StepInfo) -> None:
        self._job.write(
            "step",
            step=info.step,
            loss=info.loss,
            learning_rate=info.learning_rate,
            learning_rates=info.learning_rates,
            grad_norm=info.grad_norm,
            seconds=info.seconds,
            memory_bytes=info.memory_bytes,
            step_size=info.step_size,
        )

    def on_validation(self, step: int, loss: float) -> None:
        self._job.write("validation", step=step, loss=loss)

    def on_save(self, step: int, file: Path) -> None:
        self._job.write("save", step=step, files=[file.absolute()])

    def on_state(self, step: int, folder: Path) -> None:
        self._job.write("save", step=step, files=[folder.absolute()])

    def on_preview_files(self, step: int, files: Sequence[Path], prompts: Sequence[str]) -> None:
        self._job.write("preview", step=step, files=[file.absolute() for file in files], prompts=prompts)

    def requests(self) -> frozenset[Request]:
        return frozenset(flag for flag in FLAGS if self._job.has(flag))

    def on_request_done(self, request: Request) -> None:
        self._job.remove(request)
