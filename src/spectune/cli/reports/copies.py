"""Output of `convert` and `null`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from spectune.checkpoints.ema import EMA_ROOT
from spectune.cli.console import say
from spectune.cli.report_parts import percent, written
from spectune.errors import some_of
from spectune.ops.convert import ConvertReport
from spectune.ops.null import NullReport
from spectune.ops.options.adapter_files import ConvertOptions
from spectune.ops.options.model_files import NullOptions


def as_json(
    result: ConvertReport | NullReport, options: ConvertOptions | NullOptions, seconds: float
) -> dict[str, Any]:
    if isinstance(result, NullReport):
        return {**asdict(result), "seconds": seconds}
    return {**asdict(result), "error": result.error}


def show(result: ConvertReport | NullReport, options: ConvertOptions | NullOptions, seconds: float) -> None:
    say(written(result.path, seconds))
    if isinstance(result, NullReport):
        assert isinstance(options, NullOptions)
        zeros = result.tensors - len(result.kept)
        say(f"{zeros} of {result.tensors} tensors are zero, at the same offsets as in {options.model.name}")
        if result.kept:
            say(f"copied unchanged: {', '.join(result.kept)}")
        return
    if isinstance(options, ConvertOptions) and options.ema:
        say(f"the moving averages are the UNet; {len(result.dropped)} keys {EMA_ROOT}* are gone")
    elif result.dropped:
        say(f"{len(result.dropped)} keys were dropped: {some_of(result.dropped)}")
    if result.rounded:
        say(
            f"{len(result.rounded)} of {result.count} layers were rounded: relative error "
            f"{percent(result.error)} in total"
        )
    else:
        say(f"{result.count} layers or tensors, none was rounded")
