"""The queue of the Studio: states, the next job, and servers that end before their jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from spectune.cli.job import EVENTS, Job
from spectune.errors import InputError
from spectune.studio.jobs import process
from spectune.studio.jobs.queue import JobQueue, JobView
from spectune.studio.jobs.records import JobRecord, ProcessRecord
from spectune.studio.places import Refused

# A command that works until it finds a flag file; `end` is its exit code.
COMMAND = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
events = open(folder / "events.jsonl", "a")
def write(**event):
    print(json.dumps(event), file=events, flush=True)
write(event="start")
while not (found := [flag for flag in ("stop", "finish", "fail") if (folder / flag).exists()]):
    time.sleep(0.02)
(folder / found[0]).unlink()
if found[0] == "fail":
    write(event="error", what="no memory", hint=None)
write(event="end", exit_code={"stop": 130, "finish": 0, "fail": 2}[found[0]])
"""


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("the condition did not come true")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """Let the queue start COMMAND instead of spectune, and return the arguments that it passes."""
    commands: list[list[str]] = []
    children: list[subprocess.Popen[bytes]] = []

    def start(argv: list[str], folder: Path, cwd: Path) -> subprocess.Popen[bytes]:
        commands.append(list(argv))
        children.append(subprocess.Popen([sys.executable, "-S", "-c", COMMAND, str(folder)], cwd=cwd))
        return children[-1]

    monkeypatch.setattr("spectune.studio.jobs.queue.start", start)
    yield commands
    for child in children:
        child.kill()
        child.wait()


@pytest.fixture
def queue(tmp_path: Path) -> JobQueue:
    return JobQueue(tmp_path / "jobs")


def add(queue: JobQueue, tmp_path: Path, name: str = "style") -> JobView:
    recipe = tmp_path / f"{name}.toml"
    recipe.touch()
    return queue.add("train", {"recipe": str(recipe)})


def flag(queue: JobQueue, job: JobView, name: str) -> None:
    (queue.folder / job.record.id / name).touch()


def reaches(queue: JobQueue, job: JobView, state: str) -> JobView:
    def there() -> bool:
        queue.advance()
        return queue.job(job.record.id).state == state

    wait_for(there)
    return queue.job(job.record.id)


def test_one_job_runs_at_a_time_in_the_order_of_the_queue(
    queue: JobQueue, tmp_path: Path, started: list[list[str]]
) -> None:
    first, second = add(queue, tmp_path, "one"), add(queue, tmp_path, "two")
    assert (first.state, first.record.title) == ("queued", "train one")
    queue.advance()
    queue.advance()
    assert [job.state for job in queue.jobs()] == ["queued", "running"]  # the newest first
    flag(queue, first, "finish")
    assert reaches(queue, first, "finished").exit_code == 0
    reaches(queue, second, "running")
    assert started == [["train", "--", str(tmp_path / f"{name}.toml")] for name in ("one", "two")]


def test_a_new_server_finds_the_running_job_and_goes_on(
    queue: JobQueue, tmp_path: Path, started: list[list[str]]
) -> None:
    first, second = add(queue, tmp_path, "one"), add(queue, tmp_path, "two")
    queue.advance()
    other = JobQueue(queue.folder)
    other.advance()
    assert [job.state for job in other.jobs()] == ["queued", "running"]
    wait_for(lambda: other.events(first.record.id)["events"])
    assert other.events(first.record.id)["state"] == "running"
    flag(other, first, "finish")
    reaches(other, second, "running")
    assert len(started) == 2


def test_stop_ends_a_job_and_resume_runs_the_same_command(
    queue: JobQueue, tmp_path: Path, started: list[list[str]]
) -> None:
    job = add(queue, tmp_path)
    reaches(queue, job, "running")
    queue.request(job.record.id, "stop")
    assert reaches(queue, job, "stopped").exit_code == 130
    assert queue.resume(job.record.id).state == "queued"
    queue.advance()
    assert queue.job(job.record.id).state == "running"  # the end of the first process does not count
    flag(queue, job, "fail")
    assert reaches(queue, job, "failed").exit_code == 2
    assert started[0] == started[1]
    names = [event["event"] for event in queue.events(job.record.id)["events"]]
    assert names == ["start", "end", "start", "error", "end"]


def test_a_killed_job_is_lost_and_the_next_one_starts(
    queue: JobQueue, tmp_path: Path, started: list[list[str]]
) -> None:
    first, second = add(queue, tmp_path, "one"), add(queue, tmp_path, "two")
    reaches(queue, first, "running")
    record = ProcessRecord.read(queue.folder / first.record.id / ProcessRecord.FILE)
    assert record is not None
    psutil.Process(record.pid).kill()
    assert reaches(queue, first, "lost").exit_code is None
    reaches(queue, second, "running")


def test_a_job_that_does_not_obey_is_killed(
    queue: JobQueue, tmp_path: Path, started: list[list[str]]
) -> None:
    job = add(queue, tmp_path)
    with pytest.raises(InputError, match="does not run: it is queued"):
        queue.kill(job.record.id)
    reaches(queue, job, "running")
    assert queue.kill(job.record.id).state == "lost"
    assert queue.resume(job.record.id).state == "queued"


def test_a_damaged_record_of_a_process_starts_nothing(
    queue: JobQueue, tmp_path: Path, started: list[list[str]]
) -> None:
    job = add(queue, tmp_path)
    (queue.folder / job.record.id / ProcessRecord.FILE).write_text("")
    queue.advance()
    assert (queue.job(job.record.id).state, started) == ("lost", [])


def test_a_process_that_is_dead_but_not_yet_collected_does_not_run(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    created = psutil.Process(child.pid).create_time()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT) if hasattr(os, "waitid") else child.wait()
    assert not process.is_running(ProcessRecord(child.pid, created, 0), tmp_path)
    child.wait()


def test_another_process_with_the_same_pid_does_not_run_the_job(queue: JobQueue, tmp_path: Path) -> None:
    job = add(queue, tmp_path)
    file = queue.folder / job.record.id / ProcessRecord.FILE
    created = psutil.Process().create_time()
    ProcessRecord(os.getpid(), created, 0).write(file)
    assert queue.job(job.record.id).state == "running"
    ProcessRecord(os.getpid(), created - 1000, 0).write(file)
    assert queue.job(job.record.id).state == "lost"


def test_a_job_runs_on_when_the_clock_is_set(
    queue: JobQueue, tmp_path: Path, started: list[list[str]]
) -> None:
    job = add(queue, tmp_path)
    queue.advance()
    file = queue.folder / job.record.id / ProcessRecord.FILE
    record = ProcessRecord.read(file)
    assert record is not None
    replace(record, create_time=record.create_time + 3600).write(file)
    assert queue.job(job.record.id).state == "running"


def test_stop_takes_a_waiting_job_out_of_the_queue(
    queue: JobQueue, tmp_path: Path, started: list[list[str]]
) -> None:
    job = add(queue, tmp_path)
    assert queue.request(job.record.id, "stop").state == "stopped"
    queue.advance()
    assert started == []
    queue.resume(job.record.id)
    reaches(queue, job, "running")


def test_a_command_that_cannot_be_started_has_failed(
    queue: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*arguments: object) -> None:
        raise OSError(8, "Exec format error")

    monkeypatch.setattr("spectune.studio.jobs.queue.start", start)
    job = add(queue, tmp_path)
    queue.advance()
    assert queue.job(job.record.id).state == "failed"
    error, _ = queue.events(job.record.id)["events"]
    assert error["what"] == "the command cannot be started: [Errno 8] Exec format error"


def test_a_negative_result_is_no_failure(queue: JobQueue, tmp_path: Path) -> None:
    """Such as `verify` of files that differ: exit code 1 without an error."""
    for error, state in ((False, "finished"), (True, "failed")):
        job = add(queue, tmp_path, str(state))
        folder = queue.folder / job.record.id
        ProcessRecord(0, 0.0, 0).write(folder / ProcessRecord.FILE)
        events = Job(folder)
        if error:
            events.write("error", what="ValueError: a bug", hint=None)
        events.exit_code = 1
        events.close()
        assert queue.job(job.record.id).state == state


def test_requests_that_make_no_sense_are_errors(
    queue: JobQueue, tmp_path: Path, started: list[list[str]]
) -> None:
    job = add(queue, tmp_path)
    with pytest.raises(InputError, match="train style does not run: it is queued"):
        queue.request(job.record.id, "save")
    with pytest.raises(InputError, match="cannot be resumed: it is queued"):
        queue.resume(job.record.id)
    reaches(queue, job, "running")
    with pytest.raises(InputError, match="train style is running"):
        queue.remove(job.record.id)
    queue.request(job.record.id, "save")
    assert (queue.folder / job.record.id / "save").exists()
    for id in ("../jobs", "20261129-004512-abcdef", ""):
        with pytest.raises(Refused, match="there is no job"):
            queue.job(id)


def test_remove_deletes_what_the_studio_wrote(queue: JobQueue, tmp_path: Path) -> None:
    job = add(queue, tmp_path)
    queue.remove(job.record.id)
    assert queue.jobs() == []
    assert (tmp_path / "style.toml").exists()


def test_a_folder_that_is_no_job_is_ignored(queue: JobQueue) -> None:
    for name, text in (
        ("20261129-004512-abcdef", "{}"),
        ("notes", ""),
        ("20261129-004512-abcdea", "not JSON"),
    ):
        (queue.folder / name).mkdir(parents=True)
        (queue.folder / name / JobRecord.FILE).write_text(text)
    assert queue.jobs() == []


@pytest.mark.slow  # it imports torch
def test_a_real_command_runs_and_survives_its_server(tiny_checkpoint: Path, tmp_path: Path) -> None:
    first = JobQueue(tmp_path / "jobs")
    values = {"model": str(tiny_checkpoint), "out": str(tmp_path / "-null.safetensors")}
    job = first.add("null", values, title="Empty model")
    first.advance()
    queue = JobQueue(tmp_path / "jobs")
    assert (queue.job(job.record.id).state, job.record.title) == ("running", "Empty model")
    wait_for(lambda: queue.job(job.record.id).state != "running")
    log = queue.log(job.record.id)["text"]
    assert queue.job(job.record.id).state == "finished", log
    names = [event["event"] for event in queue.events(job.record.id)["events"]]
    assert (names[0], names[-2:]) == ("start", ["result", "end"])
    assert "wrote" in log
    assert (tmp_path / "-null.safetensors").exists()
    assert job.record.outputs == [str(tmp_path / "-null.safetensors")]
    assert (
        json.loads((queue.folder / job.record.id / EVENTS).read_text().splitlines()[0])["command"] == "null"
    )
