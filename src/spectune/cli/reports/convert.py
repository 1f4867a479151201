"""Output of `convert`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from spectune.cli.console import say
from spectune.cli.report_parts import percent, written
from spectune.errors import some_of
from spectune.ops.convert import ConvertReport
from spectune.ops.options.adapter_files import ConvertOptions


def as_json(result: ConvertReport, options: ConvertOptions, seconds: float) -> dict[str, Any]:
    return {**asdict(result), "error": result.error}


def show(result: ConvertReport, options: ConvertOptions, seconds: float) -> None:
    say(written(result.path, seconds))
    if result.dropped:
        say(f"{len(result.dropped)} keys were dropped: {some_of(result.dropped)}")
    if result.rounded:
        say(
            f"{len(result.rounded)} of {result.count} layers were rounded: relative error "
            f"{percent(result.error)} in total"
        )
    else:
        say(f"{result.count} layers or tensors, none was rounded")
