"""The jobs of a Studio: a folder each. One runs at a time."""

from __future__ import annotations

import re
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
from filelock import FileLock, Timeout

from spectune.cli.job import EVENTS, FLAGS, INTERRUPTED, Job
from spectune.errors import InputError, printable
from spectune.studio.jobs.arguments import WRITTEN, arguments_of, command_named
from spectune.studio.jobs.process import LOG, end, is_running, start
from spectune.studio.jobs.reading import ending_of, read_events, read_log
from spectune.studio.jobs.records import JobRecord, ProcessRecord, State
from spectune.studio.places import Places, Refused

_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
_SECONDS = 0.5  # between looks at the queue


@dataclass(frozen=True)
class JobView:
    """A job with its state."""

    record: JobRecord
    state: State
    exit_code: int | None

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self.record), "state": self.state, "exit_code": self.exit_code}


class JobQueue:
    """The jobs in a folder. All facts are in files, so that a new server continues where the old one ended.

    Args:
        folder: The folder of the jobs.
        places: Returns the folders that jobs may use; their results go to its `output`. None: any folder.
        check: Called with the command and the values of a job. It raises an error to refuse the job.
    """

    def __init__(
        self,
        folder: Path,
        places: Callable[[], Places] | None = None,
        check: Callable[[str, Mapping[str, Any]], None] = lambda command, values: None,
    ) -> None:
        self.folder = folder.absolute()
        self._places, self._check = places, check
        self._children: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        # what has ended: by id, the versions of the files that it follows from, and the job
        self._final: dict[str, tuple[list[int | None], JobView]] = {}

    # ---- the background

    def start(self) -> None:
        """Start a thread that starts the next job when none runs."""
        self._closed.clear()
        threading.Thread(target=self._watch, name="jobs", daemon=True).start()

    def close(self) -> None:
        """Start no more jobs. Jobs that run continue."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(_SECONDS):
            self.advance()

    def advance(self) -> None:
        """Start the next job if none runs. Several servers may share the folder."""
        self._children = [child for child in self._children if child.poll() is None]  # else they stay zombies
        if not self.folder.is_dir():
            return
        try:
            with self._lock, FileLock(self.folder / ".lock", timeout=0):
                jobs = self.jobs()
                waiting = [job.record for job in jobs if job.state == "queued"]
                if waiting and not any(job.state == "running" for job in jobs):
                    self._start(min(waiting, key=lambda record: record.queued))
        except (Timeout, OSError):  # another server is at it, or the disk is full: look again
            return

    def _start(self, record: JobRecord) -> None:
        folder = self.folder / record.id
        events = folder / EVENTS
        events_from = events.stat().st_size if events.exists() else 0
        for flag in FLAGS:  # of a process that was killed
            (folder / flag).unlink(missing_ok=True)
        try:
            Path(record.cwd).mkdir(parents=True, exist_ok=True)
            child = start(record.argv, folder, Path(record.cwd))
        except (OSError, ValueError) as error:
            self._end(record, 1, events_from, what=f"the command cannot be started: {error}")
            return
        self._children.append(child)
        try:
            created = psutil.Process(child.pid).create_time()
        except psutil.Error:  # it has ended already
            created = time.time()
        ProcessRecord(child.pid, created, events_from).write(folder / ProcessRecord.FILE)

    def _end(self, record: JobRecord, exit_code: int, events_from: int, what: str | None = None) -> None:
        """Write the end of a job that never ran."""
        folder = self.folder / record.id
        ProcessRecord(0, 0.0, events_from).write(folder / ProcessRecord.FILE)
        job = Job(folder)
        if what is not None:
            job.write("error", what=what, hint=None)
        job.exit_code = exit_code
        job.close()

    # ---- what there is

    def jobs(self) -> list[JobView]:
        """Return all jobs, the newest first."""
        folders = self.folder.iterdir() if self.folder.is_dir() else ()
        found = (self._view(folder.name) for folder in folders if _ID.fullmatch(folder.name))
        return sorted((job for job in found if job), key=lambda job: job.record.created, reverse=True)

    def job(self, id: str) -> JobView:
        """Return a job. Raises Refused if there is no such job."""
        found = self._view(id) if _ID.fullmatch(id) else None
        if found is None:
            raise Refused(f"there is no job {printable(id, 60)}")
        return found

    def _view(self, id: str) -> JobView | None:
        folder = self.folder / id
        version = [_changed(folder / name) for name in (JobRecord.FILE, ProcessRecord.FILE)]
        if id in self._final and self._final[id][0] == version:
            return self._final[id][1]
        record = JobRecord.read(folder / JobRecord.FILE)
        if record is None or record.id != id:
            return None
        if version[1] is None:
            return JobView(record, "queued", None)
        # a damaged file is no reason to run a command again
        process = ProcessRecord.read(folder / ProcessRecord.FILE) or ProcessRecord(0, 0.0, 0)
        if is_running(process, folder):  # before the events: it may write its end meanwhile
            return JobView(record, "running", None)
        code, failed = ending_of(folder / EVENTS, process.events_from)
        self._final[id] = version, JobView(record, _state(code, failed=failed), code)
        return self._final[id][1]

    def events(self, id: str, after: int = 0) -> dict[str, Any]:
        """Return the events from byte `after`, where to continue, and the state."""
        job = self.job(id)  # before the events: a job that has ended then has all of them
        events, following = read_events(self.folder / id / EVENTS, after)
        return {"events": events, "next": following, "state": job.state}

    def log(self, id: str, after: int = 0) -> dict[str, Any]:
        """Return the text of the log from byte `after`, where to continue, and the state."""
        job = self.job(id)
        text, following = read_log(self.folder / id / LOG, after)
        return {"text": text, "next": following, "state": job.state}

    # ---- what can be done

    def add(self, command: str, values: Mapping[str, Any], title: str | None = None) -> JobView:
        """Put a command into the queue.

        Raises:
            InputError: There is no such command, or it refuses the values.
            Refused: A path is outside of the folders.
        """
        places = None if self._places is None else self._places()
        argv = arguments_of(command_named(command), values, places)
        self._check(command, values)
        now = time.time()
        id = f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}-{secrets.token_hex(3)}"
        folder = self.folder / id
        folder.mkdir(parents=True)
        record = JobRecord(
            id=id,
            title=printable(title, 100) if title else _title(command, values),
            command=command,
            values=dict(values),
            argv=argv,
            cwd=str(folder if places is None else places.output),
            created=now,
            queued=now,
            outputs=[str(values[name]) for name in WRITTEN if values.get(name)],
        )
        record.write(folder / JobRecord.FILE)
        return self.job(id)

    def request(self, id: str, flag: Literal["stop", "save", "preview"]) -> JobView:
        """Ask a running job for something. A job that waits is taken out of the queue by `stop`."""
        with self._lock:
            job = self.job(id)
            if job.state == "queued" and flag == "stop":
                events = self.folder / id / EVENTS
                self._end(job.record, INTERRUPTED, events.stat().st_size if events.exists() else 0)
            elif job.state != "running":
                raise InputError(f"{job.record.title} does not run: it is {job.state}")
            elif flag != "stop" and job.record.command != "train":
                raise InputError(f"{job.record.title} is no training: it has nothing to {flag}")
            else:
                (self.folder / id / flag).touch()
        return self.job(id)

    def kill(self, id: str) -> JobView:
        """End a job at once, without a save: one that does not obey `stop`. Its results stay as they are."""
        job, process = self.job(id), ProcessRecord.read(self.folder / id / ProcessRecord.FILE)
        if job.state != "running" or process is None:
            raise InputError(f"{job.record.title} does not run: it is {job.state}")
        end(process)
        return self.job(id)

    def resume(self, id: str) -> JobView:
        """Put a training that was stopped, failed or got lost into the queue again: it continues."""
        record = self.job(id).record
        if record.command == "train":
            self._check(record.command, record.values)  # its recipe may have changed
        with self._lock:
            job = self.job(id)
            if record.command != "train" or job.state not in ("stopped", "failed", "lost"):
                raise InputError(f"{record.title} cannot be resumed: it is {job.state}")
            replace(record, queued=time.time()).write(self.folder / id / JobRecord.FILE)
            (self.folder / id / ProcessRecord.FILE).unlink(missing_ok=True)
        return self.job(id)

    def remove(self, id: str) -> None:
        """Remove a job that does not run: its events and its log, not its results."""
        with self._lock:
            job = self.job(id)
            if job.state == "running":
                raise InputError(f"{job.record.title} is running", hint="stop it first")
            shutil.rmtree(self.folder / id)
            self._final.pop(id, None)


def _changed(file: Path) -> int | None:
    """Return the time of the last change of a file, None if there is no such file."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _state(exit_code: int | None, *, failed: bool) -> State:
    """Return the state of a job that has ended. Exit code 1 without an error is a negative result."""
    states: Mapping[int | None, State] = {None: "lost", 0: "finished", INTERRUPTED: "stopped"}
    return "finished" if exit_code == 1 and not failed else states.get(exit_code, "failed")


def _title(command: str, values: Mapping[str, Any]) -> str:
    """Return the command with the name of its first file."""
    first = next((value for value in values.values() if isinstance(value, str)), "")
    return printable(f"{command} {Path(first).stem}".strip(), 100)
