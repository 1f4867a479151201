"""Output of `export`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from spectune.cli.console import say, table
from spectune.cli.report_parts import percent, written
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
        "held_by_rank": result.held,
        "warnings": result.warnings,
        "card": result.card,
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
    table("", ("part", "layers", "rank", "truncated", "relative error"), rows, left=1)
    say(
        f"{len(result.layers)} layers; rounding and truncation cause a relative error of "
        f"{percent(result.error)} in total, at most {percent(result.worst.error)} in {result.worst.name}"
    )
    if options.form == "tuned":
        zero = sum(not layer.norm for layer in result.layers)
        say(f"{zero} of {len(result.layers)} layers have no change; train from the file with model.start")
    if result.unchanged:
        say(f"{len(result.unchanged)} layers are left out: they did not change")
    if result.lost:
        say(f"{len(result.lost)} changed layers are left out for lack of room: {some_of(result.lost)}")
    if result.outside:
        say(
            f"{len(result.outside)} changed tensors do not fit into a LoRA (biases, norms, embeddings): "
            f"{result.outside_share:.2%} of the squared change is lost"
        )
    if result.held:
        shares = ", ".join(f"{share:.1%} at rank {rank}" for rank, share in result.held.items())
        say(f"a LoRA can hold this share of the squared change: {shares}")
    if result.card is not None:
        say(f"wrote {result.card}")


def _span(lowest: int, highest: int) -> str:
    return f"{lowest}" if lowest == highest else f"{lowest}..{highest}"
