"""Start the processes of jobs, and end them. They continue when the server ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from spectune.ops.options.studio import PASSWORD_VARIABLE
from spectune.studio.jobs.records import ProcessRecord

LOG = "log.txt"
_CLOCK_SECONDS = 2.0  # the system computes the start of a process anew, with a clock that is adjusted


def start(argv: Sequence[str], folder: Path, cwd: Path) -> subprocess.Popen[bytes]:
    """Start `spectune` with `--job folder`, detached from the server. Its output goes to LOG.

    Raises:
        OSError: The system cannot start it.
    """
    flags = 0
    if sys.platform == "win32":  # a console of its own, which is not shown: closing ours does not end it
        flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
    environment = {name: value for name, value in os.environ.items() if name != PASSWORD_VARIABLE}
    environment |= {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "COLUMNS": "110"}
    words = [*argv[:1], "--job", str(folder), *argv[1:]]
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            # -P: no module is imported from the working folder, which has files of strangers
            [sys.executable, "-P", "-m", "spectune", *words],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=cwd, env=environment,
            creationflags=flags, start_new_session=True,
        )  # fmt: skip


def end(process: ProcessRecord) -> None:
    """End a process and its children, and wait until they are gone."""
    try:
        main = psutil.Process(process.pid)
        ended = [*main.children(recursive=True), main]
    except psutil.Error:
        return
    for one in ended:
        with suppress(psutil.Error):
            one.kill()
    psutil.wait_procs(ended, timeout=5)


def is_running(process: ProcessRecord, folder: Path) -> bool:
    """Return whether the process of a job lives. Another process that got its pid does not count.

    Two processes with one pid differ in the time of their start. The clock may have been set since; then the
    arguments decide, which name the folder of the job.
    """
    try:
        found = psutil.Process(process.pid) if process.pid else None
        if found is None or found.status() == psutil.STATUS_ZOMBIE:
            return False
        if abs(found.create_time() - process.create_time) < _CLOCK_SECONDS:
            return True
        return str(folder) in found.cmdline()
    except psutil.Error:  # gone, or of another user
        return False
