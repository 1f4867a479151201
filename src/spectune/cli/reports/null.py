"""Output of `null`."""

from __future__ import annotations

from spectune.cli.console import say
from spectune.cli.reports.shared import written
from spectune.ops.null import NullReport
from spectune.ops.options.model_files import NullOptions


def show(result: NullReport, options: NullOptions, seconds: float) -> None:
    say(written(result.path, seconds))
    copied = f", except {', '.join(result.kept)}" if result.kept else ""
    say(f"{result.tensors} tensors are zero, at the same offsets as in {options.model.name}{copied}")
