"""Output of `merge`."""

from __future__ import annotations

from spectune.cli.console import say
from spectune.cli.report_parts import written
from spectune.ops.merge import MergeReport
from spectune.ops.options.model_files import MergeOptions


def show(result: MergeReport, options: MergeOptions, seconds: float) -> None:
    say(written(result.path, seconds))
    for model in result.models:
        say(f"  {model.weights:8}  {model.file}")
    copies = result.tensors - result.summed - result.cast
    cast = f"{result.cast} are cast to {options.dtype}, " if result.cast else ""
    say(f"{result.summed} of {result.tensors} tensors are sums, {cast}{copies} are copied byte for byte")
