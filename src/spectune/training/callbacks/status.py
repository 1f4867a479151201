"""The state of a run as one line of text, for a terminal of any width and for a log file."""

from __future__ import annotations

from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size

_BAR, _NAME = 30, 24  # widest, in columns
_LEAST_BAR, _LEAST_NAME = 8, 6
_HEAVY_LIGHT = ("\N{BOX DRAWINGS HEAVY HORIZONTAL}", "\N{BOX DRAWINGS LIGHT HORIZONTAL}")


@dataclass
class Stage:
    """Work beside the steps: caching, validation, a preview, a save."""

    name: str
    done: int
    total: int
    seconds: float = 0.0  # since it began

    def __str__(self) -> str:
        return f"{self.name}{' ' if self.total > 1 else ', '}{self.progress}"

    @property
    def progress(self) -> str:
        """The count, if there is one, and the seconds."""
        count = f"{self.done}/{self.total}, " if self.total > 1 else ""
        return f"{count}{self.seconds:.0f} s"

    @property
    def share(self) -> float:
        """The finished share, in 0..1."""
        return self.done / max(self.total, 1)


@dataclass
class Status:
    """The values that a progress display shows."""

    name: str = ""
    step: int = 0
    steps: int = 0  # 0: the training has not started
    seconds_per_step: float | None = None
    since_step: float = 0.0  # seconds since the last step
    loss: float | None = None
    validation: float | None = None
    memory_bytes: int = 0
    stage: Stage | None = None

    @property
    def left(self) -> str:
        """The remaining time of the steps."""
        if self.seconds_per_step is None:
            return "-:--:-- left"
        ahead = (self.steps - self.step) * self.seconds_per_step
        seconds = max(0, round(ahead - min(self.since_step, self.seconds_per_step)))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"

    def parts(self) -> list[str]:
        """Return what is shown beside the count and the remaining time, most important first."""
        parts = [] if self.stage is None else [str(self.stage)]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.seconds_per_step:
            parts.append(_rate(self.seconds_per_step))
        if self.validation is not None:
            parts.append(f"validation {self.validation:.4f}")
        if self.memory_bytes:
            parts.append(f"{self.memory_bytes / 1e9:.1f} GB")
        return parts


def _rate(seconds: float) -> str:
    return f"{1 / seconds:.2f} it/s" if seconds <= 1 else f"{seconds:.2f} s/it"


def plain_line(status: Status) -> str:
    """Return a line for a log file."""
    if not status.steps:
        return "" if status.stage is None else str(status.stage)
    return ", ".join([f"step {status.step}/{status.steps}", status.left, *status.parts()])


def fitted_line(status: Status, width: int, *, ascii_only: bool = False) -> str:
    """Return a line of at most `width` columns. The name, then the less important values, give way."""
    stage = status.stage
    if not status.steps:
        return "" if stage is None else _with_bar(stage.name, stage.share, stage.progress, width, ascii_only)
    values = [f"{status.step}/{status.steps}", status.left]
    name = min(cell_len(status.name), _LEAST_NAME)
    for part in status.parts():
        if name + 1 + len(" ".join([*values, part])) <= width:
            values.append(part)
    return _with_bar(status.name, status.step / status.steps, " ".join(values), width, ascii_only)


def _with_bar(name: str, share: float, values: str, width: int, ascii_only: bool) -> str:
    room = width - cell_len(values) - 1
    shown = min(cell_len(name), _NAME, max(room, 0))
    bar = min(_BAR, room - shown - 1)
    if bar < _LEAST_BAR and shown > _LEAST_NAME:  # a shorter name makes room for a bar
        shown = max(_LEAST_NAME, min(shown, room - _LEAST_BAR - 1))
        bar = room - shown - 1
    label = _cut(name, shown)
    if bar < _LEAST_BAR:
        return f"{_cut(name, min(cell_len(name), max(room, 0)))} {values}".strip()[:width]
    full = round(share * bar)
    done, todo = ("#", "-") if ascii_only else _HEAVY_LIGHT
    return f"{label} {done * full}{todo * (bar - full)} {values}"


def _cut(text: str, width: int) -> str:
    return text if cell_len(text) <= width else set_cell_size(text, max(width - 2, 0)) + ".." * (width >= 2)
