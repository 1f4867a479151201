"""Faults at every file operation of a command, the search for broken promises, and a round of all kinds."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from random import Random

import pytest

from tests.faults.__main__ import main
from tests.faults.children import Ended, Setting, Strike, run
from tests.faults.jobs import Job
from tests.faults.kinds import Scene
from tests.faults.place import Place, files_of
from tests.faults.promises import (
    Result,
    check_changed_input,
    check_end,
    check_files,
    check_inputs,
    check_next_run,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="commands run in forked processes")
JOB = Job(
    "null", "null {i}/model.safetensors -o {o}/x.safetensors", ("model.safetensors",), whole=("folder",)
)
USUAL = Ended(0, "", 1.0, 5)


@pytest.fixture
def place(tiny_checkpoint: Path, tmp_path: Path) -> Place:
    place = Place(tmp_path, is_disk=False)
    for folder in (place.pristine, place.disk):
        folder.mkdir()
    shutil.copyfile(tiny_checkpoint, place.pristine / "model.safetensors")
    place.renew()
    return place


def scene_of(place: Place, job: Job = JOB) -> Scene:
    return Scene(job, place, Random(0), USUAL, False)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM] if hasattr(signal, "SIGKILL") else [])
def test_a_command_survives_an_end_at_each_file_operation(number: int, place: Place) -> None:
    words = JOB.arguments(place.inputs, place.out)
    usual = run(words, place.root)
    expected, pristine = files_of(place.out), files_of(place.pristine)
    assert (usual.code, list(expected)) == (0, ["x.safetensors"])
    assert usual.operations >= 5
    for operation in range(1, usual.operations + 1):
        place.renew()
        strike = Strike(lambda pid: os.kill(pid, number), at_operation=operation)
        ended = run(words, place.root, Setting(strike))
        result = Result()
        check_end("kill" if number == signal.SIGKILL else "signal", [ended], result)
        check_files(scene_of(place), [ended], result, expected=expected, old={})
        check_next_run(scene_of(place), [ended], result, expected=expected)
        check_inputs(place, pristine, result)
        assert (result.was_hit, result.problems) == (True, []), operation


def test_an_incomplete_file_and_a_part_of_a_folder_are_found(place: Place) -> None:
    expected = {"x.safetensors": "hash", "folder/a": "1", "folder/b": "2"}
    (place.out / "x.safetensors").write_bytes(b"half")
    (place.out / "folder").mkdir()
    (place.out / "folder" / "a").write_text("")
    result = Result()
    check_files(scene_of(place), [Ended(-9, "", 0.1)], result, expected=expected, old={})
    assert result.problems == [
        "incomplete: folder/a",
        "incomplete: x.safetensors",
        "incomplete: folder/ is neither the new nor the old folder",
    ]


def test_a_damaged_input_is_found(place: Place) -> None:
    pristine, result = files_of(place.pristine), Result()
    (place.inputs / "model.safetensors").write_bytes(b"")
    check_inputs(place, pristine, result)
    assert result.damaged_inputs > 0
    assert result.problems


def test_tracebacks_and_wrong_exit_codes_are_found() -> None:
    result = Result()
    check_end(
        "disk full", [Ended(1, "Traceback (most recent call last)", 0.1), Ended(2, "no message", 0.1)], result
    )
    assert [problem.partition(":")[0] for problem in result.problems] == [
        "exit code 1",
        "traceback",
        "not one error message",
    ]


def test_a_leftover_and_a_failing_next_run_are_found(place: Place) -> None:
    (place.out / ".left.partial").write_text("")
    result = Result()
    check_next_run(scene_of(place), [USUAL], result, expected={})
    assert (result.failed_next_runs, result.problems[0].partition(":")[0]) == (
        1,
        "the next run wrote other files",
    )
    (place.inputs / "model.safetensors").unlink()
    check_next_run(scene_of(place), [USUAL], result, expected={})
    assert result.failed_next_runs == 2


def test_a_mixture_of_two_versions_of_an_input_is_found(place: Place) -> None:
    (place.out / "x.safetensors").write_bytes(b"a mixture")
    result = Result()
    check_changed_input(scene_of(place), [USUAL], result, expected={"x.safetensors": "hash"})
    assert result.problems == ["exit code 0, but the output is a mixture of two versions of an input"]


@pytest.mark.slow
def test_a_round_of_faults_breaks_no_promise() -> None:
    assert main(["40", "--seed", "7"]) == 0
