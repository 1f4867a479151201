from __future__ import annotations

import pytest
from rich.cells import cell_len

from spectune.training.callbacks.status import Stage, Status, fitted_line, plain_line

STATUS = Status(
    name="style",
    step=120,
    steps=3000,
    seconds_per_step=2.5,
    loss=0.1075,
    validation=0.1034,
    memory_bytes=12_300_000_000,
)


def test_a_line_of_eighty_columns() -> None:
    line = fitted_line(STATUS, 80, ascii_only=True)
    assert line == "style 120/3000 2:00:00 left loss 0.1075 2.50 s/it validation 0.1034 12.3 GB"


@pytest.mark.parametrize("width", [30, 40, 60, 79, 120, 200])
@pytest.mark.parametrize("name", ["t", "a-very-long-name-" * 8, "\N{CJK UNIFIED IDEOGRAPH-7E2E}" * 60])
@pytest.mark.parametrize("stage", [None, Stage("encoding validation images", 3, 8, 12.0)])
def test_step_and_time_left_survive(width: int, name: str, stage: Stage | None) -> None:
    status = Status(name=name, step=12345, steps=999999, seconds_per_step=0.25, loss=0.5, stage=stage)
    line = fitted_line(status, width)
    assert "12345/999999" in line
    assert "68:35:13 left" in line or "68:35:14 left" in line
    assert cell_len(line) <= width


def test_the_bar_shows_the_share() -> None:
    line = fitted_line(Status(name="t", step=50, steps=100, seconds_per_step=1.0), 60, ascii_only=True)
    assert line.startswith("t " + "#" * 14 + "-" * 14 + " 50/100 0:00:50 left 1.00 it/s")


def test_stages_before_the_training_and_beside_it() -> None:
    stage = Stage("encoding images", 16, 64, 8.0)
    assert plain_line(Status(stage=stage)) == "encoding images 16/64, 8 s"
    line = fitted_line(Status(stage=stage), 60, ascii_only=True)
    assert line == "encoding images ########---------------------- 16/64, 8 s"
    status = Status(
        name="t", step=1, steps=4, seconds_per_step=1.0, stage=Stage("saving the state", 0, 1, 2.0)
    )
    assert "1/4 0:00:03 left saving the state, 2 s" in fitted_line(status, 80)
