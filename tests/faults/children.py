"""Run command lines in forked processes, and make something happen at one of their file operations."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if os.name == "posix" else ()
LONGEST_SECONDS = 180.0  # a command that takes longer hangs
# What Python reports to audit hooks about files. Writes are not among them: see `after_seconds`.
_EVENTS = {
    "open",
    "os.rename",
    "os.link",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.truncate",
    "shutil.rmtree",
}


@dataclass(frozen=True)
class Strike:
    """Something that happens once while a command runs: at a file operation, or after some seconds."""

    action: Callable[[int], None]  # called with the process id
    at_operation: int | None = None
    after_seconds: float | None = None


@dataclass(frozen=True)
class Setting:
    """How a command runs."""

    strike: Strike | None = None
    largest_file: int | None = None  # bytes; what exceeds it is an error, as on a full disk
    prepare: Callable[[], None] | None = None  # called in the new process


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int  # the exit code, or minus the number of the signal that ended it
    said: str  # on stderr
    seconds: float
    operations: int = 0  # on files; 0 if it was killed
    first_step: int = 0  # of a training: the finished steps when it started
    last_step: int = 0  # of a training: the finished steps when it ended


class Child:
    """A running command. It is forked, because importing torch takes seconds."""

    def __init__(self, arguments: list[str], watched: Path, setting: Setting) -> None:
        self.setting = setting
        self._said, said = os.pipe()
        self._notes, notes = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self._began = time.monotonic()
        # A signal in the new process before `_run_and_exit` would make it go on as a second tool.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self.pid = os.fork()
        if self.pid == 0:
            _run_and_exit(arguments, watched, setting, said, notes)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.close(said)
        os.close(notes)

    def wait(self) -> Ended:
        """Strike if it is time, and return what the command did when it has ended."""
        strike, text = self.setting.strike, {self._said: b"", self._notes: b""}
        due = None if strike is None or strike.after_seconds is None else self._began + strike.after_seconds
        hangs = self._began + LONGEST_SECONDS
        open_pipes = set(text)
        while open_pipes:
            now = time.monotonic()
            if due is not None and now >= due:
                assert strike is not None
                strike.action(self.pid)
                due = None
            if now >= hangs:
                os.kill(self.pid, signal.SIGKILL)
                hangs = now + LONGEST_SECONDS
                text[self._said] += b"\nTraceback: the command did not end\n"
            limit = min(due or hangs, hangs) - now
            for fd in select.select(list(open_pipes), [], [], max(0.0, limit))[0]:
                chunk = os.read(fd, 1 << 16)
                text[fd] += chunk
                if not chunk:
                    os.close(fd)
                    open_pipes.remove(fd)
        _, status = os.waitpid(self.pid, 0)
        notes = dict(line.split() for line in text[self._notes].decode().splitlines())
        return Ended(
            os.waitstatus_to_exitcode(status),
            text[self._said].decode(errors="replace"),
            time.monotonic() - self._began,
            **{key: int(value) for key, value in notes.items()},
        )


def warm_up(arguments: list[str]) -> None:
    """Run a command line in this process, so that its forks need not import what it imports late."""
    from spectune.cli.app import run as run_command

    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        run_command(arguments)
    finally:
        for fd, saved in zip((1, 2), kept, strict=True):
            os.dup2(saved, fd)
            os.close(saved)
        os.close(nowhere)


def run(arguments: list[str], watched: Path, setting: Setting | None = None) -> Ended:
    """Run a command line to its end. Operations on files in `watched` are counted."""
    return Child(arguments, watched, setting or Setting()).wait()


@dataclass
class _Watch:
    """An audit hook that counts file operations and strikes at one of them."""

    folder: str
    strike: Strike | None
    count: int = 0
    striking: bool = field(default=False)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in _EVENTS or self.striking or not isinstance(args[0], str | os.PathLike):
            return
        if not os.fspath(args[0]).startswith(self.folder):
            return
        self.count += 1
        if self.strike is not None and self.count == self.strike.at_operation:
            self.striking = True
            self.strike.action(os.getpid())
            self.striking = False


def _run_and_exit(arguments: list[str], watched: Path, setting: Setting, said: int, notes: int) -> None:
    code = 70
    try:
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        # pytest replaces these streams.
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        _tell_steps(notes)
        from spectune.cli.app import main

        if setting.prepare is not None:
            setting.prepare()
        if setting.largest_file is not None:
            import resource  # POSIX only

            resource.setrlimit(resource.RLIMIT_FSIZE, (setting.largest_file, resource.RLIM_INFINITY))
        watch = _Watch(os.fspath(watched), setting.strike)
        sys.addaudithook(watch)
        try:
            main(arguments)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 70
        os.write(notes, f"operations {watch.count}\n".encode())
    except KeyboardInterrupt:
        code = 130
    except BaseException:  # the tool looks for tracebacks in the output
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _tell_steps(notes: int) -> None:
    """Let a training write its steps to a pipe, which survives a kill."""
    from spectune.training.callbacks.console import ConsoleProgress

    on_start, on_step = ConsoleProgress.on_start, ConsoleProgress.on_step

    def start(self: Any, start: Any) -> None:
        os.write(notes, f"first_step {start.first_step}\nlast_step {start.first_step}\n".encode())
        on_start(self, start)

    def step(self: Any, info: Any) -> None:
        os.write(notes, f"last_step {info.step}\n".encode())
        on_step(self, info)

    ConsoleProgress.on_start, ConsoleProgress.on_step = start, step
