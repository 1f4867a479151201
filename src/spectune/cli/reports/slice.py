"""Output of `slice`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from spectune.cli.console import say
from spectune.cli.report_parts import percent, written
from spectune.errors import some_of
from spectune.ops.options.adapter_files import SliceOptions
from spectune.ops.slice.adapters import SliceReport
from spectune.ops.slice.parts import SwapReport


def as_json(result: SliceReport | SwapReport, options: SliceOptions, seconds: float) -> dict[str, Any]:
    return asdict(result)


def show(result: SliceReport | SwapReport, options: SliceOptions, seconds: float) -> None:
    if isinstance(result, SliceReport):
        _print_slices(result, seconds)
        return
    say(written(result.path, seconds))
    for part, name in result.parts.items():
        say(f"  {part:5} from {name}")


def _print_slices(result: SliceReport, seconds: float) -> None:
    say(written(result.path, seconds))
    for piece in result.slices:
        say(f"  {piece.slice}")
        say(f"    kept     {_layers(piece.kept)}")
        if piece.removed:
            say(f"    removed  {_layers(piece.removed)}: {some_of(piece.removed)}")
    if result.overlaps:
        say(f"{len(result.overlaps)} layers are the sum of several slices: {some_of(result.overlaps)}")
    if result.role == "tuned":
        say("the trained deltas were copied unchanged; use the file with rebuild or export")
    elif result.error:
        say(f"rounding the factors caused a relative error of {percent(result.error)}")
    else:
        say("no factor was rounded")


def _layers(names: Sequence[str]) -> str:
    parts = Counter(name.partition(".")[0] for name in names)
    counted = ", ".join(f"{count} {part}" for part, count in parts.items())
    return f"{len(names)} layers" + (f" ({counted})" if counted else "")
