from __future__ import annotations

import signal
import threading

import pytest

from spectune.training.interrupt import StopRequest


def announced(messages: list[str]) -> list[str]:
    for thread in threading.enumerate():
        if thread.name == "announce":
            thread.join()
    return messages


def test_the_first_ctrl_c_says_what_it_does_and_the_second_stops() -> None:
    messages: list[str] = []
    with StopRequest(messages.append) as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        assert announced(messages) == ["saving after this step; press again to stop without saving"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert len(announced(messages)) == 1


def test_a_request_to_end_the_process_is_announced_once() -> None:
    messages: list[str] = []
    with StopRequest(messages.append) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
    assert announced(messages) == ["saving after this step"]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="the signal of a closed terminal on this system")
def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)
