"""The rows of results of benchmarks/gpu.py: passed between processes, saved as JSON, printed as tables.

Only the standard library is imported, so that a broken torch or a missing package becomes a row too.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

PREFIX = "ROW "  # of the lines of a stage's process that are rows
TAIL_CHARACTERS = 1500

Status = Literal["ok", "failed", "out of time", "skipped", "not installed", "out of memory", "needs CUDA"]
Values = Mapping[str, Any]
NEEDS_CUDA: Status = "needs CUDA"


class NeedsCuda(Exception):
    """A measurement needs a CUDA card, and there is none."""


@dataclass(frozen=True)
class Row:
    """One result. `table` and `name` say what was measured, `values` are the columns."""

    table: str
    name: str
    status: Status = "ok"
    values: Values = field(default_factory=dict)
    note: str = ""  # the reason, or the last lines of a failure

    def line(self) -> str:
        """Return the row as a line of a process. Inverse: `parse_line`."""
        return PREFIX + json.dumps(asdict(self))


def parse_line(line: str) -> Row | None:
    """Return the row of a line, or None if the line is other output."""
    return Row(**json.loads(line.removeprefix(PREFIX))) if line.startswith(PREFIX) else None


class Emit(Protocol):
    """Record a row of the running stage."""

    def __call__(
        self, name: str, values: Values | None = None, *, status: Status = "ok", note: str = ""
    ) -> None: ...


def emit_to(table: str, add: Callable[[Row], None]) -> Emit:
    """Return an `Emit` that passes the rows of one table to `add`."""

    def emit(name: str, values: Values | None = None, *, status: Status = "ok", note: str = "") -> None:
        add(Row(table, name, status, values or {}, note))

    return emit


def guarded(emit: Emit, name: str, measure: Callable[[], Values], known: Values | None = None) -> None:
    """Emit the values of a measurement after the `known` ones, or the reason why it failed."""
    try:
        emit(name, {**(known or {}), **measure()})
    except Exception as error:  # each failure is a result
        status, note = _status_of(error)
        emit(name, known, status=status, note=note)


def _status_of(error: Exception) -> tuple[Status, str]:
    if isinstance(error, NeedsCuda):
        return NEEDS_CUDA, ""
    kinds = (type(error), type(error.__cause__))
    # by name: importing torch for the class would make this module depend on it
    if any(kind.__name__ == "OutOfMemoryError" for kind in kinds):
        return "out of memory", str(error).split(". ")[0]
    if any(issubclass(kind, ImportError) for kind in kinds):
        return "not installed", str(error)
    return "failed", "".join(traceback.format_exception(error))[-TAIL_CHARACTERS:]


class Report:
    """All rows so far. The file is written after each row."""

    def __init__(self, path: Path, **facts: Any) -> None:
        self.path, self.facts = path, facts
        self.rows: list[Row] = []
        self._began = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(f"{self.seconds:6.0f} s  {row.table}: {row.name}: {_cells(row)}", flush=True)
        self.save()

    def save(self) -> None:
        content = {
            **self.facts,
            "seconds": round(self.seconds, 1),
            "rows": [asdict(row) for row in self.rows],
        }
        self.path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def tables(self) -> str:
        """Return one Markdown table for each table of rows; reasons and last lines follow it."""
        parts: list[str] = []
        for title in dict.fromkeys(row.table for row in self.rows):
            parts += [f"\n### {title}\n", *_table([row for row in self.rows if row.table == title])]
        return "\n".join(parts)


def _table(rows: list[Row]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row.values))
    lines = [f"| | {' | '.join([*columns, 'status'])} |", f"| --- |{' ---: |' * len(columns)} --- |"]
    for row in rows:
        cells = [row.name, *(_text(row.values.get(column, "")) for column in columns), row.status]
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"{row.name}: {row.note}" for row in rows if row.note]
    return [*lines, *(["", "```text", *notes, "```"] if notes else [])]


def _cells(row: Row) -> str:
    values = ", ".join(f"{key} {_text(value)}" for key, value in row.values.items())
    last = (row.note.strip().splitlines() or [""])[-1]
    status = "" if row.status == "ok" else f"{row.status}{': ' * bool(last)}{last}"
    return "; ".join(part for part in (values, status) if part)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
