"""Commands that make new files out of others: slices and conversions."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from spectune import api
from spectune.cli.commands.weights import percent, written
from spectune.cli.console import print_json, print_warning, progress, say
from spectune.errors import some_of
from spectune.ops.convert import ConvertReport
from spectune.ops.slice.adapters import SliceReport


def slice_files(
    slices: Sequence[str],
    out: Path,
    *,
    traits: Path | None,
    base: Path | None,
    keys: str,
    dtype: str | None,
    overlap: bool,
    force: bool,
    as_json: bool,
) -> None:
    started = time.perf_counter()
    with progress("slice") as report:
        result = api.slice(
            slices,
            out,
            traits=traits,
            base=base,
            keys=keys,
            dtype=dtype,
            overlap=overlap,
            force=force,
            progress=report,
        )
    if as_json:
        print_json(result)
    elif isinstance(result, SliceReport):
        _print_slices(result, started)
    else:
        say(written(result.path, started))
        for part, name in result.parts.items():
            say(f"  {part:5} of {name}")


def _print_slices(result: SliceReport, started: float) -> None:
    for warning in result.warnings:
        print_warning(warning)
    say(written(result.path, started))
    for piece in result.slices:
        say(f"  {piece.slice}")
        say(f"    kept     {_layers(piece.kept)}")
        if piece.removed:
            say(f"    removed  {_layers(piece.removed)}: {some_of(piece.removed)}")
    if result.overlaps:
        say(f"{len(result.overlaps)} layers are sums of several slices: {some_of(result.overlaps)}")
    if result.role == "tuned":
        say("the file holds trained deltas, as they were: rebuild and export take it")
    elif result.error:
        say(f"rounding the factors cost {percent(result.error)} of the change")
    else:
        say("nothing was rounded")


def _layers(names: Sequence[str]) -> str:
    parts = Counter(name.partition(".")[0] for name in names)
    counted = ", ".join(f"{count} {part}" for part, count in parts.items())
    return f"{len(names)} layers" + (f" ({counted})" if counted else "")


def convert_file(
    source: Path,
    out: Path,
    *,
    keys: str,
    dtype: str | None,
    even_alphas: bool,
    principal: Path | None,
    drop: Sequence[str],
    base: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    started = time.perf_counter()
    with progress("convert") as report:
        result = api.convert(
            source,
            out,
            keys=keys,
            dtype=dtype,
            even_alphas=even_alphas,
            principal=principal,
            drop=drop,
            base=base,
            force=force,
            progress=report,
        )
    if as_json:
        print_json({**asdict(result), "error": result.error})
    else:
        _print_conversion(result, started)


def _print_conversion(result: ConvertReport, started: float) -> None:
    for warning in result.warnings:
        print_warning(warning)
    say(written(result.path, started))
    if result.dropped:
        say(f"{len(result.dropped)} keys were left out: {some_of(result.dropped)}")
    if result.rounded:
        say(
            f"{len(result.rounded)} of {result.count} layers were rounded: together they are off by "
            f"{percent(result.error)}"
        )
    else:
        say(f"{result.count} layers or tensors, nothing was rounded")
