"""Stop after the current step on Ctrl-C, SIGTERM, SIGUSR1 or a closed terminal."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

# SIGHUP: the terminal or the ssh session was closed. SIGBREAK: the same for a console window on Windows.
_CLOSED = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGBREAK") if hasattr(signal, name))
# SIGUSR1: SLURM sends it before the time of a job ends. Windows does not have it.
_ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


def handled_signals() -> list[int]:
    """Return the signals that end a training. There are none in another thread than the first.

    Python allows signal handlers in the main thread only. A user interface may train in another thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    # a program that nohup has started ignores some
    return [number for number in (*_ENDING, *_CLOSED) if signal.getsignal(number) is not signal.SIG_IGN]


class StopRequest:
    """A context in which the first signal only sets `requested`; a second SIGINT stops at once.

    Args:
        announce: Called with what the first signal does.
    """

    def __init__(self, announce: Callable[[str], None] = lambda text: None) -> None:
        self.requested = False
        self._announce = announce
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in handled_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        is_first, self.requested = not self.requested, True
        if number in _CLOSED:
            _drop_output()
        elif is_first:
            again = "; press again to stop without saving" if number == signal.SIGINT else ""
            # In a thread of its own: the signal may have interrupted a write to the same stream.
            text = f"saving after this step{again}"
            threading.Thread(target=self._announce, args=[text], name="announce", daemon=True).start()


def _drop_output() -> None:
    """Discard further output: writing to a closed terminal is an error, which would prevent the save."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the end


def ignore_interrupts(worker: int) -> None:
    """Keep signals from a data worker. The training process stops its workers after it has saved.

    A terminal and torchrun send a signal to all processes of a group, SLURM sends SIGUSR1 to all of a job.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
