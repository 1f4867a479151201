"""Ask the assistant, from the threads of the server."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from spectune.errors import InputError, SpectuneError

LOG_BYTES = 1_000_000  # a larger log is started anew
DEFAULT_SECONDS = 120.0
START_SECONDS = 600.0  # a virus scanner that reads torch for the first time takes minutes


class Superseded(SpectuneError):
    """A newer question about the same topic replaced this one; nobody waits for its reply."""


class Assistant:
    """The child process. One question at a time; a child that ends or hangs is replaced by a new one."""

    def __init__(self, log: Path, command: Sequence[str] = ("-m", "spectune.studio.assistant")) -> None:
        self._log = log
        self._command = command  # arguments of Python
        self._child: subprocess.Popen[str] | None = None
        self._replies: queue.Queue[str | None] = queue.Queue()
        self._ready = False  # the child has imported what it needs
        self._turn = threading.Condition()
        self._busy = False
        self._newest: dict[str, int] = {}
        self._count = 0

    def start(self) -> None:
        """Start the child in the background; it imports torch while nobody waits."""
        with self._turn:
            if self._child is None or self._child.poll() is not None:
                self._start()

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()

    def ask(
        self,
        question: str,
        values: Mapping[str, Any],
        *,
        roots: Iterable[Path] = (),
        topic: str | None = None,
        seconds: float = DEFAULT_SECONDS,
    ) -> Any:
        """Return the answer to a question of questions.py. It blocks.

        Args:
            question: A key of QUESTIONS.
            values: Fields of the question; JSON types.
            roots: The folders in which the question may open files.
            topic: Cancel older questions with this topic that still wait.
            seconds: How long to wait for the answer once the assistant works on it.

        Raises:
            InputError: The library refuses the values.
            Superseded: A newer question with the same topic came.
            SpectuneError: The assistant ended, or took too long.
        """
        with self._turn:
            self._count += 1
            number = self._count
            if topic is not None:
                self._newest[topic] = number
                self._turn.notify_all()
            while self._busy:
                self._turn.wait()
                self._check_newest(topic, number)
            self._busy = True
        try:
            return self._exchange(number, question, values, roots, seconds)
        finally:
            with self._turn:
                self._busy = False
                self._turn.notify_all()

    def _check_newest(self, topic: str | None, number: int) -> None:
        if topic is not None and self._newest[topic] != number:
            raise Superseded("a newer question replaced this one")

    def _exchange(
        self, number: int, question: str, values: Mapping[str, Any], roots: Iterable[Path], seconds: float
    ) -> Any:
        line = {"id": number, "ask": question, "values": values, "roots": [str(root) for root in roots]}
        child = self._running_child()
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(line) + "\n")
            child.stdin.flush()
            if not self._ready:
                self._ready = self._replies.get(timeout=START_SECONDS) is not None
            reply = self._replies.get(timeout=seconds) if self._ready else None
        except queue.Empty:
            what = f"the question `{question}`" if self._ready else "the start of the assistant"
            limit = seconds if self._ready else START_SECONDS
            self.close()
            raise SpectuneError(f"{what} took more than {limit:g} seconds and was stopped") from None
        except OSError:
            reply = None
        if reply is None:
            self.close()
            raise SpectuneError(
                f"the assistant ended while it worked on `{question}`; the next question starts it",
                hint=f"the reason is at the end of {self._log}",
            )
        # NaN is not JSON, and no page can read it
        answer = json.loads(reply, parse_constant=lambda _: None)
        if answer["last"]:
            self.close()
            self.start()
        if "error" in answer:
            raise InputError(answer["error"]["what"], hint=answer["error"]["hint"])
        return answer["answer"]

    def _running_child(self) -> subprocess.Popen[str]:
        with self._turn:
            if self._child is None or self._child.poll() is not None:
                self._start()
            assert self._child is not None
            return self._child

    def _start(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        too_large = self._log.exists() and self._log.stat().st_size > LOG_BYTES
        replies: queue.Queue[str | None] = queue.Queue()
        with self._log.open("w" if too_large else "a", encoding="utf-8") as log:
            # -P: no module is imported from the working folder
            child = subprocess.Popen(
                [sys.executable, "-P", *self._command],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, encoding="utf-8",
                env={**os.environ, "PYTHONUTF8": "1", "TRANSFORMERS_VERBOSITY": "error"},
            )  # fmt: skip
        assert child.stdout is not None
        threading.Thread(target=_read, args=(child.stdout, replies), daemon=True).start()
        self._child, self._replies, self._ready = child, replies, False


def _read(stream: IO[str], replies: queue.Queue[str | None]) -> None:
    """Pass on the lines of a child, and None when it ends."""
    for line in stream:
        replies.put(line)
    replies.put(None)
