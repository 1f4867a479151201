"""A log of scalars and previews for TensorBoard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from spectune.errors import SpectuneError
from spectune.training.callbacks import Callbacks, RunStart, StepInfo, TrainReport


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
