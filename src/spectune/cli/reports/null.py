"""Output of `null`."""

from __future__ import annotations

from spectune.cli.console import say
from spectune.cli.report_parts import written
from spectune.ops.null import NullReport
from spectune.ops.options.model_files import NullOptions


def show(result: NullReport, options: NullOptions, seconds: float) -> None:
    say(written(result.path, seconds))
    zeros = result.tensors - len(result.kept)
    say(f"{zeros} of {result.tensors} tensors are zero, at the same offsets as in {options.model.name}")
    if result.kept:
        say(f"copied unchanged: {', '.join(result.kept)}")
