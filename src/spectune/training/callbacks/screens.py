"""Where progress is shown: a terminal, a notebook, or a log file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from time import monotonic
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from spectune.training.callbacks.status import Status, fitted_line, plain_line

LINE_SECONDS = 30.0  # between lines in a log file
_NOTEBOOK_SECONDS = 0.5  # between updates of a notebook


class Screen(Protocol):
    """Shows messages and the newest status."""

    def message(self, text: str) -> None:
        """Show a line above the status."""

    def update(self, status: Status) -> None:
        """Show the status, or keep it until it is time."""

    def close(self, *, keep: bool) -> None:
        """End the display of the status; `keep` leaves its last line."""


def screen_for(console: Console) -> Screen:
    """Return the screen for a console."""
    if console.is_jupyter:
        return NotebookScreen()
    return TerminalScreen(console) if console.is_terminal else LogScreen(console)


class TerminalScreen:
    """A line at the bottom of a terminal, which moves between the steps too."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status, self._changed, self._stage_seconds = Status(), monotonic(), 0.0
        self._live: Live | None = None

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, status: Status) -> None:
        self._status, self._changed = status, monotonic()
        self._stage_seconds = 0.0 if status.stage is None else status.stage.seconds
        if self._live is None:
            self._live = Live(
                get_renderable=self._line, console=self._console, redirect_stdout=sys.stdout.isatty()
            )
            self._live.start()

    def close(self, *, keep: bool) -> None:
        if self._live is not None:
            self._live.transient = not keep
            self._live.stop()
            self._live = None

    def _line(self) -> Text:
        status, passed = self._status, monotonic() - self._changed
        status.since_step = passed
        if status.stage is not None:
            status.stage.seconds = self._stage_seconds + passed
        ascii_only = not self._console.encoding.startswith("utf")
        # one column less: a full line makes some terminals break it
        line = fitted_line(status, self._console.width - 1, ascii_only=ascii_only)
        return Text(line, no_wrap=True, overflow="crop")


class LogScreen:
    """Lines without escapes, at most one in LINE_SECONDS, and the last one."""

    def __init__(self, console: Console, *, now: Callable[[], float] = monotonic) -> None:
        self._console, self._now = console, now
        self._status, self._printed = Status(), ""
        self._last: float | None = None

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, status: Status) -> None:
        self._status = status
        is_due = self._last is None or self._now() - self._last >= LINE_SECONDS
        if is_due and (status.step or status.stage):
            self._print()

    def close(self, *, keep: bool) -> None:
        if keep:
            self._print()
        self._last = None

    def _print(self) -> None:
        line = plain_line(self._status)
        if line and line != self._printed:
            self.message(line)
        self._printed, self._last = line, self._now()


class NotebookScreen:
    """One output of a cell, which is replaced. It needs no widgets."""

    def __init__(self, *, now: Callable[[], float] = monotonic) -> None:
        self._now = now
        self._handle: Any = None
        self._status, self._last = Status(), 0.0

    def message(self, text: str) -> None:
        print(text)

    def update(self, status: Status) -> None:
        self._status = status
        if self._handle is None or self._now() - self._last >= _NOTEBOOK_SECONDS:
            self._show(plain_line(status))

    def close(self, *, keep: bool) -> None:
        if self._handle is not None:
            self._show(plain_line(self._status) if keep else "")
        self._handle = None

    def _show(self, line: str) -> None:
        content, self._last = {"text/plain": line}, self._now()
        if self._handle is None:
            display = import_module("IPython.display").display
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)
