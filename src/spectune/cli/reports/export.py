"""What `export` prints."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from spectune.cli.console import say, table
from spectune.cli.reports.shared import percent, written
from spectune.errors import some_of
from spectune.ops.export.report import ExportReport
from spectune.ops.options.adapter_files import ExportOptions


def as_json(result: ExportReport, options: ExportOptions, seconds: float) -> dict[str, Any]:
    return {
        "path": result.path,
        "hash": result.hash,
        "layers": len(result.layers),
        "error": result.error,
        "parts": {loss.part: asdict(loss) for loss in result.parts},
        "layer_errors": {layer.name: layer.error for layer in result.layers},
        "unchanged": result.unchanged,
        "lost": result.lost,
        "outside": result.outside,
        "outside_share": result.outside_share,
        "warnings": result.warnings,
        "seconds": seconds,
    }


def show(result: ExportReport, options: ExportOptions, seconds: float) -> None:
    say(written(result.path, seconds))
    rows = [
        (
            loss.part,
            f"{loss.layers}",
            _span(loss.lowest_rank, loss.highest_rank),
            f"{loss.truncated}",
            percent(loss.error),
        )
        for loss in result.parts
    ]
    table("", ("part", "layers", "rank", "cut", "error of the change"), rows, left=1)
    say(
        f"{len(result.layers)} layers; the change they make is off by {percent(result.error)} by rounding "
        f"and truncation, at most {percent(result.worst.error)} in {result.worst.name}"
    )
    if result.unchanged:
        say(f"{len(result.unchanged)} layers did not change and are left out")
    if result.lost:
        say(f"{len(result.lost)} layers found no room and are lost: {some_of(result.lost)}")
    if result.outside:
        say(
            f"{len(result.outside)} tensors changed that the LoRA does not hold (biases, norms, embeddings): "
            f"{result.outside_share:.2%} of the squared change"
        )


def _span(lowest: int, highest: int) -> str:
    return f"{lowest}" if lowest == highest else f"{lowest}..{highest}"
