"""The table and the plot of losses beside the result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spectune.errors import InputError
from spectune.training.callbacks import RunStart, StepInfo, TrainReport
from spectune.training.callbacks.loss_curve import LossCurve
from spectune.training.callbacks.loss_plot import smoothed
from spectune.training.callbacks.loss_table import LossRow, read_table


def log(curve: LossCurve, first: int, last: int) -> None:
    curve.on_start(RunStart(name="v1.5", steps=9, first_step=first, images=1, trained_parameters=1))
    for step in range(first + 1, last + 1):
        curve.on_step(
            StepInfo(
                step=step,
                loss=1 / step,
                learning_rates={"unet": 1e-4, "te1": 1e-5},
                grad_norm=1.0,
                step_size={},
                seconds=1.0,
                memory_bytes=1,
                delta_norms={},
            )
        )


def end(curve: LossCurve) -> None:
    curve.on_end(TrainReport(9, 0, 1.0, None, None, None, (), interrupted=False, warnings=()))


def test_a_resumed_run_has_the_whole_history(tmp_path: Path) -> None:
    messages: list[str] = []
    curve = LossCurve(tmp_path, "v1.5", messages.append)
    curve.on_validation(0, 2.0)
    log(curve, 0, 4)
    curve.on_save(4, tmp_path)
    log(curve, 4, 6)  # not saved: a resumed run repeats these steps
    end(curve)
    assert curve.files == (tmp_path / "v1.5-loss.png", tmp_path / "v1.5-loss.csv")
    assert read_table(curve.table)[:2] == [
        LossRow(0, validation_loss=2.0),
        LossRow(1, loss=1.0, learning_rate=1e-4),
    ]

    resumed = LossCurve(tmp_path, "v1.5", messages.append)
    log(resumed, 4, 5)
    resumed.on_state(5, tmp_path)
    assert [row.step for row in read_table(resumed.table)] == [0, 1, 2, 3, 4, 5]
    again = LossCurve(tmp_path, "v1.5", messages.append)
    log(again, 0, 1)
    end(again)
    assert [row.step for row in read_table(again.table)] == [1]
    with Image.open(tmp_path / "v1.5-loss.png") as picture:
        assert picture.size == (990, 616)
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20) or []}
    assert (0x00, 0x72, 0xB2) in colors  # the smoothed loss, also of a single step
    assert messages == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v1.5-loss.csv", "v1.5-loss.png"]


def test_a_run_without_steps_writes_nothing(tmp_path: Path) -> None:
    curve = LossCurve(tmp_path, "t", print)
    log(curve, 0, 0)
    end(curve)
    assert curve.files == ()
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_open_elsewhere_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(source: Path, target: Path) -> None:
        raise PermissionError(13, "The process cannot access the file", str(target))

    messages: list[str] = []
    curve = LossCurve(tmp_path, "t", messages.append)
    monkeypatch.setattr("spectune.files.rename.rename", rename)
    log(curve, 0, 2)
    end(curve)
    assert messages == [
        f"warning: cannot write the losses to {tmp_path / 't-loss.csv'}: The process cannot access the file; "
        "the next save tries again"
    ]
    assert curve.files == ()


def test_another_file_of_that_name_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "t-loss.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"t-loss\.csv is not the loss table of a run"):
        LossCurve(tmp_path, "t", print)


def test_smoothing_keeps_the_mean_and_the_ends() -> None:
    values = np.random.default_rng(0).normal(1.0, 0.5, 1000)
    smooth = np.array(smoothed(list(values)))
    assert smooth[500] == pytest.approx(values[490:511].mean())
    assert smooth[0] == pytest.approx(values[:11].mean())
    assert smooth[-1] == pytest.approx(values[-11:].mean())
    assert smoothed([3.0, 1.0]) == [3.0, 1.0]
