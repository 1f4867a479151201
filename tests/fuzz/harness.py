"""Run one input of a target, and decide whether spectune handled it well.

An input is good if it is accepted or refused: a SpectuneError in Python; on the command line the exit code 2
and one error message. Any other exception, too much time, or too much memory is a finding.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from hypothesis.strategies import SearchStrategy

import spectune
from spectune.cli.app import run
from spectune.errors import SpectuneError, visible

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
HUNG_SECONDS = 20  # of CPU; then an input is interrupted
_EXIT_CODES = (0, 1, 2)


class Outcome(StrEnum):
    """The result of an input."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    FINDING = "finding"


@dataclass(frozen=True)
class Limits:
    """What one input may cost."""

    cpu_seconds: float = 2.0
    nbytes: int = 200_000_000  # of memory, beyond the size of the files


@dataclass(frozen=True)
class Trial:
    """How one input went."""

    outcome: Outcome
    kind: str = ""  # of a finding: equal for inputs that fail at the same place
    detail: str = ""  # a traceback, or the message of the refusal
    cpu_seconds: float = 0.0
    nbytes: int = 0  # beyond the size of the files; 0 where it cannot be measured


class Target(Protocol):
    """One kind of input. An input is a sequence of bytes, which a target writes as one or several files."""

    name: str
    is_for_bytes: bool  # whether single bytes matter, as in a file format

    def seeds(self) -> Sequence[bytes]:
        """Return valid inputs."""
        ...

    def inputs(self) -> SearchStrategy[bytes]:
        """Return a strategy for inputs, most of which are invalid."""
        ...

    def write(self, folder: Path, data: bytes) -> None:
        """Write the files of an input into an empty folder, which is the working directory.

        Raises ValueError if `data` is not an input of this target.
        """
        ...

    def operate(self, folder: Path) -> None:
        """Run the operation in Python."""
        ...

    def arguments(self, folder: Path) -> list[str] | None:
        """Return the same operation as a command line; None if there is none."""
        ...


class Refused(Exception):
    """A command line ended with exit code 2 and one error message."""


class BadOutput(Exception):
    """A command line printed what it should not print."""


class _Hung(BaseException):
    """An input took HUNG_SECONDS. Not an Exception, so that no `except Exception` hides it."""


def examine(
    target: Target, data: bytes, folder: Path, *, limits: Limits | None = None, on_command_line: bool = False
) -> Trial:
    """Run one input in `folder`, which is emptied first.

    Raises ValueError if `data` is not an input of the target.
    """
    limits = limits or Limits()
    _make_empty(folder)
    with contextlib.chdir(folder):
        target.write(folder, data)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        arguments = target.arguments(folder) if on_command_line else None
        before = _start_memory()
        started = time.process_time()
        outcome, kind, detail = _outcome(target, folder, arguments)
        seconds = time.process_time() - started
    nbytes = max(0, _peak_memory() - before - size)
    if outcome is not Outcome.FINDING:
        place = re.sub(r"\W+", " ", detail).strip()[:40]
        if seconds > limits.cpu_seconds:
            outcome, kind = Outcome.FINDING, f"slow: {place}"
        elif nbytes > limits.nbytes:
            outcome, kind = Outcome.FINDING, f"memory: {place}"
    return Trial(outcome, kind, detail, seconds, nbytes)


def _outcome(target: Target, folder: Path, arguments: list[str] | None) -> tuple[Outcome, str, str]:
    try:
        with _interrupted_after(HUNG_SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if arguments is None:
                target.operate(folder)
            else:
                run_command(arguments)
    except (SpectuneError, Refused) as error:
        return Outcome.REFUSED, "", str(error)
    except (Exception, _Hung) as error:
        lines = "".join(traceback.format_exception(error))
        return Outcome.FINDING, f"{type(error).__name__} in {_place(error)}", lines
    return Outcome.ACCEPTED, "", ""


PACKAGE = Path(spectune.__file__).parent


def _place(error: BaseException) -> str:
    """Return the innermost function of spectune in a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    if not own or isinstance(error, BadOutput):
        return re.sub(r"\W+", " ", str(error)).strip()[:40]
    return f"{Path(own[-1].filename).name} {own[-1].name}"


def run_command(arguments: Sequence[str]) -> None:
    """Run a command line in this process, and check its exit code and stderr.

    Raises:
        Refused: The exit code is 2, with one error message.
        BadOutput: The exit code or stderr is not as documented.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(list(arguments))
    if code == 2 and "--json" in arguments and err.getvalue():
        _ = json.loads(out.getvalue())["error"]["what"]
    check_output(code, err.getvalue())


def check_output(code: int, stderr: str) -> None:
    """Raise Refused for a good refusal, BadOutput for an output that is not as documented."""
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    if code not in _EXIT_CODES:
        raise BadOutput(f"exit code {code}")
    if "Traceback (most recent call last)" in stderr:
        raise BadOutput("traceback on stderr")
    if visible(stderr.replace("\t", " ")) != stderr.replace("\t", " "):
        raise BadOutput(f"control characters on stderr: {stderr!r}")
    if len(errors) != (code == 2) and not (code == 2 and _is_help(stderr)):
        raise BadOutput(f"{len(errors)} errors with exit code {code}: {stderr}")
    if code == 2:
        raise Refused(errors[0] if errors else "help")


def _is_help(stderr: str) -> bool:
    """Return whether a group of commands without a command printed its help."""
    return not stderr.strip()


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


@contextlib.contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """Raise _Hung after `seconds` of CPU. Windows has no such timer."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise _Hung(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _start_memory() -> int:
    """Reset the peak of this process's memory, and return the current use in bytes; 0 outside Linux."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return 0
    return _status("VmRSS")


def _peak_memory() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    """Return a number of bytes in the status of this process; 0 outside Linux."""
    try:
        text = STATUS.read_text()
    except OSError:
        return 0
    return 1024 * int(re.search(rf"^{key}:\s+(\d+) kB", text, flags=re.MULTILINE)[1])  # pyright: ignore
