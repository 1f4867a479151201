from __future__ import annotations

import pickle
import signal

import pytest

from spectune.errors import Stopped
from spectune.training.processes.stopping import held_signals, own_work


def test_a_signal_between_own_work_waits_for_the_next_one() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with held_signals():
        with own_work():
            pass
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped, match=str(128 + signal.SIGTERM)), own_work():
            pytest.fail("the work began")
    assert signal.getsignal(signal.SIGTERM) is before
    with own_work():  # of another run
        pass


def test_a_signal_interrupts_own_work() -> None:
    @own_work()
    def work() -> None:
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the work went on")

    with held_signals(), pytest.raises(Stopped):
        work()


def test_a_second_ctrl_c_interrupts_anything() -> None:
    with held_signals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_what_stopped_a_process_can_be_sent_to_others() -> None:
    stopped = Stopped(128 + signal.SIGTERM)
    stopped.what = f"process 1: {stopped.what}"
    sent = pickle.loads(pickle.dumps(stopped))
    assert (sent.code, sent.what) == (stopped.code, "process 1: stopped by SIGTERM")
