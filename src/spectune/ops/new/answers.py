"""Questions to the user, and warnings about what is assumed if there is nobody to ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Ask = Callable[[str, str, Sequence[str]], str]  # (question, default, choices) -> the reply


class Answers:
    """Questions to the user, and warnings about what was assumed if there is nobody to ask."""

    def __init__(self, ask: Ask | None) -> None:
        self._ask = ask
        self.warnings: list[str] = []

    def get(self, question: str, default: str, choices: Sequence[str] = (), *, assumed: str = "") -> str:
        """Return the reply, or `default` with the warning `assumed`."""
        if self._ask is not None:
            return self._ask(question, default, choices)
        if assumed:
            self.warnings.append(assumed)
        return default
