"""A signal that reaches one process of a training ends all of them, with one message.

A process that ended alone would leave the others waiting for it. A signal therefore interrupts only what a
process does by itself. While it exchanges data with the others, the signal waits until its next own work, and
`agreement` and `sharing` send it to all.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from spectune.errors import Stopped
from spectune.training.interrupt import handled_signals


class _Held:
    """The signal that waits, and whether the process works by itself."""

    stopped: Stopped | None = None
    in_own_work = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.stopped is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stopped = self.stopped or Stopped(128 + number)
        if self.in_own_work:
            raise self.stopped


_held = _Held()


@contextmanager
def held_signals() -> Iterator[None]:
    """Let signals inside the block interrupt `own_work` only. A second SIGINT interrupts anything."""
    before = {number: signal.signal(number, _held.handle) for number in handled_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _held.stopped = None


@contextmanager
def own_work() -> Iterator[None]:
    """Mark work without communication; raise Stopped there if a signal arrives, or has arrived before."""
    if _held.stopped is not None:
        raise _held.stopped
    _held.in_own_work = True
    try:
        yield
    finally:
        _held.in_own_work = False
