"""Print the output of commands: results on stdout, everything else on stderr."""

from __future__ import annotations

import errno
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

from spectune.cli.tables import fitted_table
from spectune.errors import FileNote, SpectuneError, one_line, visible


class SafeConsole(Console):
    """A console that replaces control characters: names and values may come from a stranger's file."""

    def render(self, *args: Any, **options: Any) -> Iterator[Segment]:
        for segment in super().render(*args, **options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


err = SafeConsole(stderr=True, highlight=False)

Report = Callable[[int, int, str], None]


def print_error(error: SpectuneError) -> None:
    """Print `error:` with what happened and `hint:` with what to do next, on stderr."""
    err.print(Text.assemble(("error: ", "bold red"), one_line(error.what)), soft_wrap=True)
    if error.hint:
        print_hint(error.hint)


def user_error(error: BaseException) -> SpectuneError | None:
    """Return the message for an error that a user can fix, or None for a bug."""
    if isinstance(error, SpectuneError):
        return error
    if isinstance(error, OSError):
        # A full disk or missing permissions: the message of the system names the file and the cause.
        return _explained(error)
    if isinstance(error, MemoryError) or "torch" in sys.modules:
        # Only then: importing torch for its class would slow down `--help`.
        from spectune.model.memory_errors import is_out_of_memory, out_of_memory

        return out_of_memory(error) if is_out_of_memory(error) else None
    return None


def _explained(error: OSError) -> SpectuneError:
    """Return the error of a failed write or read, with a hint if the disk is full."""
    what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    if error.errno not in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return SpectuneError(what)
    if error.filename:
        folder = next(path for path in Path(error.filename).absolute().parents if path.exists())
        what += f" ({shutil.disk_usage(folder).free / 1e6:,.1f} MB free)"
    return SpectuneError(what, hint="make room on this disk; no incomplete file was left")


def print_hint(what: str) -> None:
    """Print `hint:` and a message on stderr."""
    err.print(Text.assemble(("hint: ", "bold cyan"), one_line(what)), soft_wrap=True)


def print_warning(what: str) -> None:
    """Print `warning:` and a message on stderr."""
    err.print(Text.assemble(("warning: ", "bold yellow"), one_line(what)), soft_wrap=True)


def print_note(what: str) -> None:
    """Print `note:` and a message on stderr."""
    err.print(Text.assemble(("note: ", "bold"), one_line(what)), soft_wrap=True)


@contextmanager
def file_notes(note: Callable[[str], None] = print_note) -> Iterator[None]:
    """Pass every FileNote to `note`, once; other Python warnings are shown as before."""
    shown: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", FileNote)
        show_other = warnings.showwarning

        def show(message: Any, category: type[Warning], *place: Any) -> None:
            if not issubclass(category, FileNote):
                show_other(message, category, *place)
            elif str(message) not in shown:
                shown.add(str(message))
                note(str(message))

        warnings.showwarning = cast("Any", show)
        yield


def print_json(record: Any) -> None:
    """Print a record as JSON on stdout."""
    print(json.dumps(asdict(cast("Any", record)) if is_dataclass(record) else record, indent=2, default=str))


def say(line: str = "") -> None:
    """Print a line on stderr."""
    # no markup: a path may contain square brackets
    err.print(one_line(line), soft_wrap=True, markup=False)


def show_result(text: str) -> None:
    """Print text on stdout. A pipe gets it unchanged, a terminal without control characters."""
    print(visible(text) if sys.stdout.isatty() else text)


def heading(line: str) -> None:
    """Print a bold line on stderr."""
    err.print(Text(line, style="bold"), soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """Print a table on stderr. The first `left` columns are text, the others are numbers."""
    if title:  # rich would wrap a Table title at the width of the table
        err.print(Text(title, style="italic"), soft_wrap=True)
    cells = [[one_line(cell) for cell in row] for row in rows]
    err.print(fitted_table(columns, cells, left=left, width=err.width), crop=False)


# Of a progress bar: 2515/2515 1000.0/s 0:00:00 left 0:00:00, with a space before each and before the name.
_BAR_COLUMNS = 9 + 8 + 7 + 4 + 7 + 7


class _Rate(ProgressColumn):
    """Shows finished items per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "")


@contextmanager
def progress(title: str) -> Iterator[Report]:
    """Show a progress bar with rate and remaining time; yield its update function (done, total, name)."""
    bar_width = 30 if err.width >= 110 else 16
    # the name gets what the other columns leave: rich would shorten all of them
    room = max(0, min(48, err.width - len(title) - bar_width - _BAR_COLUMNS))
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=bar_width),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}", style="dim", markup=False),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    with bar:
        task = bar.add_task(title, total=None, name="")

        def report(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, name=name[-room:] if room else "")

        yield report


def megabytes(nbytes: int | float) -> str:
    """Format a size in MB or GB, where 1 MB is 1e6 bytes."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
