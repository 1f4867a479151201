"""Test that all processes get the result or the error of one of them. The other processes are played here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from accelerate import Accelerator

from spectune.errors import InputError
from spectune.training.processes import agreement
from spectune.training.processes.agreement import check_equal, on_all, on_main, without_paths


def connection(index: int, count: int = 2) -> Accelerator:
    fake = SimpleNamespace(num_processes=count, process_index=index, is_main_process=index == 0)
    return cast("Accelerator", fake)


def fails() -> int:
    raise InputError("no pictures", hint="add some")


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the list of what the other processes send; they come after this one."""
    sent: list[Any] = []
    monkeypatch.setattr(agreement, "gather_object", lambda mine: [*mine, *sent])
    monkeypatch.setattr(agreement.platform, "node", lambda: "here")
    return sent


def test_the_main_process_sends_its_result_and_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(agreement, "broadcast_object_list", lambda values: sent.append(list(values)))
    assert on_main(connection(0), lambda: 3) == 3
    with pytest.raises(InputError, match="no pictures") as caught:
        on_main(connection(0), fails)
    assert not caught.value.is_reported
    assert sent == [[3, None], [None, caught.value]]


def test_the_others_receive_both_and_call_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def receive(values: list[Any]) -> None:
        values[:] = received

    monkeypatch.setattr(agreement, "broadcast_object_list", receive)
    received: list[Any] = [7, None]
    assert on_main(connection(1), fails) == 7
    received = [None, InputError("the output folder is locked")]
    with pytest.raises(InputError, match="locked") as caught:
        on_main(connection(1), fails)
    assert caught.value.is_reported  # the main process prints it


def test_an_error_of_one_process_stops_all_and_names_it(peers: list[Any]) -> None:
    peers.append(("process 1 on there", InputError("no pictures", hint="add some")))
    with pytest.raises(InputError, match=r"^process 1 on there: no pictures") as caught:
        on_all(connection(0), lambda: 3)
    assert caught.value.hint == "add some"
    peers[:] = [("process 1 on there", None)]
    assert on_all(connection(0), lambda: 3) == 3


def test_an_error_of_all_processes_names_none(peers: list[Any]) -> None:
    peers.append(("process 1 on there", InputError("no pictures")))
    with pytest.raises(InputError, match=r"^no pictures"):
        on_all(connection(0), fails)


def test_different_inputs_are_an_error_with_the_processes(peers: list[Any]) -> None:
    peers.append(("process 1 on there", {"the base": "a", "the images": "other"}))
    with pytest.raises(InputError, match=r"the images of process 0 on here and of process 1 on there differ"):
        check_equal(connection(0), lambda: {"the base": "a", "the images": "mine"})
    peers[:] = [("process 1 on there", {"the base": "a"})]
    check_equal(connection(0), lambda: {"the base": "a"})


def test_one_process_communicates_nothing() -> None:
    assert on_main(connection(0, 1), lambda: 1) == on_all(connection(0, 1), lambda: 1) == 1
    check_equal(connection(0, 1), lambda: pytest.fail("nothing to compare"))


def test_recipes_may_differ_in_the_places_of_folders() -> None:
    one = {"data": {"folders": (Path("/mnt/a/cats"),), "repeats": 2}}
    other = {"data": {"folders": (Path("/data/cats"),), "repeats": 2}}
    assert without_paths(one) == without_paths(other) == {"data": {"folders": ["cats"], "repeats": 2}}
    assert without_paths(one) != without_paths({"data": {"folders": (Path("/data/dogs"),), "repeats": 2}})
