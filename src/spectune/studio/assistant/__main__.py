"""The assistant: reply to questions on stdin until it is closed."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from typing import IO, Any

from spectune.cli.allocators import set_allocators
from spectune.errors import SpectuneError


def main() -> None:
    """Import what the questions need, then reply to one line after the other."""
    # Replies have a file of their own, so that a library that prints does not disturb them.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    set_allocators()
    from spectune.studio.assistant import questions

    _write(out, {"ready": True})
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C goes to the server and its children
        for line in sys.stdin:
            _reply(out, json.loads(line), questions)
            if questions.holds_card():
                return  # the memory of the card is for trainings; the next process does not hold any


def _reply(out: IO[str], question: dict[str, Any], questions: Any) -> None:
    """Reply to one question; `last` says that this process ends."""
    reply: dict[str, Any] = {"id": question["id"]}
    try:
        reply["answer"] = questions.reply(question["ask"], question["values"], question["roots"])
    except Exception as error:
        what, hint = questions.explained(error)
        if not isinstance(error, SpectuneError):
            traceback.print_exc()
        reply["error"] = {"what": what, "hint": hint}
    reply["last"] = questions.holds_card()
    _write(out, reply)


def _write(out: IO[str], line: dict[str, Any]) -> None:
    out.write(json.dumps(line, default=str) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
