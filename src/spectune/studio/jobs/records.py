"""The files that the Studio writes into the folder of a job: what to run, and the process that runs it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from spectune.files.rename import replacing

# queued: not started. lost: the process is gone and has not written its end: it was killed, or the machine.
State = Literal["queued", "running", "finished", "stopped", "failed", "lost"]


@dataclass(frozen=True)
class _Record:
    """A JSON file with the fields of a record."""

    @classmethod
    def read(cls, file: Path) -> Self | None:
        """Return the record, or None if there is no such file, or another one."""
        try:
            data: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return cls(**{field.name: data[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, file: Path) -> None:
        with replacing(file) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


@dataclass(frozen=True)
class JobRecord(_Record):
    """What a job runs."""

    FILE = "job.json"

    id: str
    title: str
    command: str  # a name of the table of commands
    values: dict[str, Any]  # fields of its record
    argv: list[str]  # arguments of the command line, without --job
    cwd: str
    created: float  # seconds since 1970
    queued: float  # later than `created` if it was resumed; the queue has this order
    outputs: list[str]  # files and folders that it writes, as far as its values name them


@dataclass(frozen=True)
class ProcessRecord(_Record):
    """The process of a job."""

    FILE = "process.json"

    pid: int  # 0 if it could not be started
    create_time: float  # of the process; another process with this pid has another one
    events_from: int  # bytes of the event file that earlier processes of the job have written
