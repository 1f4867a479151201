"""The losses and learning rates of a run as a table and a plot beside its result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from spectune.training.callbacks import Callbacks, RunStart, StepInfo, TrainReport
from spectune.training.callbacks.loss_table import LossRow, read_table, write_table


class LossCurve(Callbacks):
    """Writes `NAME-loss.csv` and `NAME-loss.png` at each save and at the end.

    A resumed run continues the table up to its first step, so that the plot shows the whole history.

    Args:
        output: The folder of the run.
        name: The name of the run.
        notify: Called with a warning if the files cannot be written. On Windows, another program may have
            them open.

    Raises:
        InputError: The file at the place of the table is not a loss table.
    """

    def __init__(self, output: Path, name: str, notify: Callable[[str], None]) -> None:
        self.table = output / f"{name}-loss.csv"
        self.plot = output / f"{name}-loss.png"
        self.name = name
        self.files: tuple[Path, ...] = ()  # the files that were written
        self._notify = notify
        self._before = read_table(self.table)
        self._rows: list[LossRow] = []

    def on_start(self, start: RunStart) -> None:
        # A validation before the first step is in the rows already.
        self._rows = [row for row in self._before if 0 < start.first_step >= row.step] + self._rows

    def on_step(self, info: StepInfo) -> None:
        self._rows.append(LossRow(info.step, loss=info.loss, learning_rate=info.learning_rate))

    def on_validation(self, step: int, loss: float) -> None:
        self._rows.append(LossRow(step, validation_loss=loss))

    def on_save(self, step: int, file: Path) -> None:
        self._write()

    def on_state(self, step: int, folder: Path) -> None:
        self._write()

    def on_end(self, report: TrainReport) -> None:
        self._write()

    def _write(self) -> None:
        if not self._rows:
            return
        try:
            write_table(self._rows, self.table)
            self._draw()
        except OSError as error:
            self._notify(
                f"warning: cannot write the losses to {error.filename or self.table}: {error.strerror}; "
                "the next save tries again"
            )
        else:
            self.files = (self.plot, self.table)

    def _draw(self) -> None:
        from spectune.training.callbacks.loss_plot import draw_losses  # matplotlib takes 0.5 s to import

        draw_losses(self._rows, self.plot, title=self.name)
