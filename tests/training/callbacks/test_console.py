from __future__ import annotations

import sys
from io import StringIO
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from spectune.training.callbacks import RunStart, StepInfo, TrainReport
from spectune.training.callbacks.console import ConsoleProgress
from spectune.training.callbacks.screens import LogScreen, NotebookScreen

REPORT = TrainReport(
    steps=100,
    first_step=0,
    seconds=1.0,
    training_loss=0.1,
    validation_before=None,
    validation_after=None,
    files=(),
    interrupted=False,
    warnings=(),
)


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def run_through(progress: ConsoleProgress, clock: Clock, *, steps: int = 100) -> None:
    """Report the events of a run with steps of one second."""
    progress.on_message("training on cpu")
    for done in range(3):
        progress.on_progress("encoding images", done, 3)
    progress.on_progress("encoding images", 3, 3)
    progress.on_start(RunStart(name="style", steps=steps, first_step=0, images=3, trained_parameters=1))
    for step in range(1, steps + 1):
        clock.seconds += 1
        progress.on_step(
            StepInfo(
                step=step,
                loss=0.5,
                learning_rates={"unet": 1.0},
                grad_norm=1.0,
                step_size={},
                seconds=1.0,
                memory_bytes=2_000_000_000,
                delta_norms={},
            )
        )
    progress.on_end(REPORT)


def test_a_log_file_gets_plain_lines_at_a_sensible_rate() -> None:
    stream, clock = StringIO(), Clock()
    screen = LogScreen(Console(file=stream, width=80), now=clock)
    run_through(ConsoleProgress(screen=screen, now=clock), clock)
    assert stream.getvalue().splitlines() == [
        "training on cpu",
        "encoding images 0/3, 0 s",
        *(
            f"step {step}, {left} left, loss 0.5000, 1.00 it/s, 2.0 GB"
            for step, left in (
                ("1/100", "0:01:39"),
                ("31/100", "0:01:09"),
                ("61/100", "0:00:39"),
                ("91/100", "0:00:09"),
                ("100/100", "0:00:00"),
            )
        ),
    ]


def test_a_terminal_shows_the_last_line_and_no_more_than_its_width() -> None:
    stream, clock = StringIO(), Clock()
    console = Console(file=stream, width=80, force_terminal=True, color_system=None)
    run_through(ConsoleProgress(console, now=clock), clock)
    assert "100/100 0:00:00 left loss 0.5000 1.00 it/s 2.0 GB\n" in stream.getvalue()


def test_a_notebook_gets_one_output_that_is_replaced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs: list[list[str]] = []

    class Handle:
        def __init__(self, text: str) -> None:
            outputs.append([text])

        def update(self, content: dict[str, str], *, raw: bool) -> None:
            outputs[-1].append(content["text/plain"])

    def display(content: dict[str, str], **options: Any) -> Handle:
        assert options == {"raw": True, "display_id": True}
        return Handle(content["text/plain"])

    module = ModuleType("IPython.display")
    module.display = display  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    clock = Clock()
    run_through(ConsoleProgress(screen=NotebookScreen(now=clock), now=clock), clock)
    assert [shown[-1] for shown in outputs] == [
        "",
        "step 100/100, 0:00:00 left, loss 0.5000, 1.00 it/s, 2.0 GB",
    ]
    captured = capsys.readouterr()
    assert captured.out == "training on cpu\n"
    assert captured.err == ""
