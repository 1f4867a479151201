"""The events and the log of a job, from any position and bounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EVENT_BYTES, LOG_BYTES = 4_000_000, 200_000  # of one reply
_LONGEST_LINE = 64_000_000  # a result has one line
_TAIL_BYTES = 65536  # contain the last two events: an error and the end


def read_events(file: Path, after: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Return the complete events from byte `after`, and the position of the next ones.

    A line that is not JSON was left by a killed process, and is skipped.
    """
    try:
        with file.open("rb") as stream:
            stream.seek(after)
            data = stream.read(EVENT_BYTES)
            if b"\n" not in data and len(data) == EVENT_BYTES:
                data += stream.readline(_LONGEST_LINE)
    except OSError:
        return [], after
    end = data.rfind(b"\n") + 1
    events: list[dict[str, Any]] = []
    for line in data[:end].splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events, after + end


def read_log(file: Path, after: int = 0) -> tuple[str, int]:
    """Return the text of a log from byte `after`, and the position of the next one. 0: its newest part."""
    try:
        size = file.stat().st_size
        start = max(0, size - LOG_BYTES) if after == 0 else min(after, size)
        with file.open("rb") as stream:
            stream.seek(start)
            data = stream.read(LOG_BYTES)
    except OSError:
        return "", after
    end = data.rfind(b"\n") + 1 or len(data)  # whole lines, so that no character is cut
    return data[:end].decode("utf-8", errors="replace"), start + end


def ending_of(file: Path, start: int) -> tuple[int | None, bool]:
    """Return the exit code in the event `end`, None without one, and whether an error came before.

    Events before byte `start` do not count.
    """
    size = file.stat().st_size if file.exists() else 0
    events, _ = read_events(file, max(start, size - _TAIL_BYTES))
    if not events or events[-1].get("event") != "end":
        return None, False
    return int(events[-1]["exit_code"]), any(event.get("event") == "error" for event in events)
