"""Events and logs from any position."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spectune.studio.jobs import reading


def test_events_continue_at_the_position_of_the_reply_before(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    assert reading.read_events(file) == ([], 0)
    file.write_text('{"event": "start"}\n{"event": "st')
    events, following = reading.read_events(file)
    assert (events, following) == ([{"event": "start"}], 19)
    with file.open("a") as stream:
        stream.write('ep"}\n{"tor\n[1]\n{"event": "end"}\n')
    assert reading.read_events(file, following)[0] == [{"event": "step"}, {"event": "end"}]
    assert reading.read_events(file, 10_000) == ([], 10_000)


def test_a_reply_is_bounded_but_a_long_line_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "EVENT_BYTES", 100)
    file = tmp_path / "events.jsonl"
    lines = [{"event": "step", "step": number} for number in range(20)]
    lines.insert(10, {"event": "result", "report": "x" * 500})
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found: list[object] = []
    replies = after = 0
    while after < file.stat().st_size:
        events, after = reading.read_events(file, after)
        found += events
        replies += 1
    assert found == lines
    assert replies > 5


def test_the_log_begins_with_its_newest_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LOG_BYTES", 40)
    file = tmp_path / "log.txt"
    assert reading.read_log(file) == ("", 0)
    file.write_bytes(b"old\n" * 20 + "größer\nwrote a".encode() + b"\xff")
    text, following = reading.read_log(file)
    assert text.endswith("old\ngrößer\n")
    assert len(text) < 40
    with file.open("ab") as stream:
        stream.write(b"b\n")
    assert reading.read_log(file, following)[0] == "wrote a\N{REPLACEMENT CHARACTER}b\n"
