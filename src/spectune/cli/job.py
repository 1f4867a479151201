"""The folder of `--job`: events for other programs, and the flag files that they write.

docs/reference/events.md documents both.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from time import monotonic, time
from typing import Any, BinaryIO, Literal, cast

from spectune.cli.console import print_warning, user_error
from spectune.errors import InputError, Stopped, one_line

EVENTS = "events.jsonl"
FLAGS: tuple[Literal["stop", "save", "preview"], ...] = ("stop", "save", "preview")
INTERRUPTED = 130  # exit code after Ctrl-C
_PROGRESS_SECONDS = 0.25  # between progress events

Level = Literal["info", "note", "warning"]


class Job:
    """Writes the events of a command and reads its flag files. Without a folder, it does neither.

    Raises:
        InputError: The folder cannot be created, or its event file cannot be written.
    """

    def __init__(self, folder: Path | None = None, *, now: Callable[[], float] = monotonic) -> None:
        self.folder = None if folder is None else folder.absolute()
        self.exit_code = 0
        self._now = now
        self._stage, self._reported = ("", 0, 0), -math.inf
        self._file: BinaryIO | None = None
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = _open_events(self.folder / EVENTS)
            except OSError as error:
                raise InputError(
                    f"cannot write to the job folder {folder}: {error.strerror or error}",
                    hint="pass another folder to --job",
                ) from None

    def write(self, event: str, **fields: Any) -> None:
        """Append an event to the file."""
        if self._file is None:
            return
        line = json.dumps({"time": time(), "event": event, **_plain(fields)}, default=str, allow_nan=False)
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        except OSError as error:  # a full disk stops the command itself, if it needs the disk
            self._file = None
            print_warning(f"{self.folder}: {error.strerror or error}; no more events are written")

    def message(self, text: str, level: Level = "info") -> None:
        """Write a message; the prefix `warning:` or `note:` decides the level."""
        for prefix in ("warning", "note"):
            if text.startswith(f"{prefix}: "):
                text, level = text.removeprefix(f"{prefix}: "), cast("Level", prefix)
        self.write("message", level=level, text=one_line(text))

    def progress(self, done: int, total: int, name: str, *, stage: str = "") -> None:
        """Write the progress, at most four times per second, but always the begin and the end of a stage."""
        before, self._stage = self._stage, (stage, total, done)
        begins = before[:2] != (stage, total) or done < before[2]
        if begins or done >= total or self._now() - self._reported >= _PROGRESS_SECONDS:
            self._reported = self._now()
            self.write("progress", done=done, total=total, name=one_line(name))

    def has(self, flag: str) -> bool:
        """Return whether a flag file exists."""
        return self.folder is not None and (self.folder / flag).exists()

    def remove(self, flag: str) -> None:
        """Remove a flag file. One that another program has open stays until the next call."""
        if self.folder is not None:
            with suppress(OSError):
                (self.folder / flag).unlink()

    def check_stop(self) -> None:
        """Raise KeyboardInterrupt, as Ctrl-C does, if the flag file `stop` exists."""
        if self.has("stop"):
            raise KeyboardInterrupt

    def close(self) -> None:
        """Remove the flag files, which have no effect any more, and write the last event."""
        for flag in FLAGS:
            self.remove(flag)
        self.write("end", exit_code=self.exit_code)
        if self._file is not None:
            self._file.close()


def is_first_process() -> bool:
    """Return whether this is the first process of a command. Without torchrun or accelerate, it is."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def recorded(folder: Path | None, command: str, arguments: Sequence[str]) -> Iterator[Job]:
    """Write the first and the last event of a command, and its error.

    Of several processes that accelerate has started, only the first one writes.
    """
    job = Job(folder if is_first_process() else None)
    if job.folder is not None:
        from spectune.files.provenance import spectune_version  # imports torch

        facts = {"version": spectune_version(), "pid": os.getpid(), "cwd": str(Path.cwd())}
        job.write("start", command=command, argv=list(arguments), **facts)
    try:
        yield job
    except BaseException as error:
        job.exit_code = _exit_code(error, job)
        raise
    finally:
        job.close()


def _exit_code(error: BaseException, job: Job) -> int:
    """Write the event of an error, and return the exit code of the process."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, Stopped):
        return cast("int", error.code)
    shown = user_error(error)
    if shown is None:
        job.write("error", what=one_line(f"{type(error).__name__}: {error}"), hint=None)
        return 1
    job.write("error", what=shown.what, hint=shown.hint)
    return shown.exit_code


def _open_events(path: Path) -> BinaryIO:
    """Open an event file to append; a line that a killed process left incomplete is ended."""
    torn = False
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
    file = path.open("ab")
    if torn:
        file.write(b"\n")
    return file


def _plain(value: Any) -> Any:
    """Return a value that JSON has: a number that is not finite becomes None, a record a mapping."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    return value
