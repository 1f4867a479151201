"""Output of `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectune.cli.console import say
from spectune.cli.report_parts import say_device
from spectune.ops.compare import CompareReport
from spectune.ops.options.pictures import CompareOptions
from spectune.sampling.contact_sheet import format_psnr


def prepare(options: CompareOptions) -> CompareOptions:
    if not all(Path(word).is_dir() for word in options.models):  # folders of pictures are only read
        say_device(options)
    return options


def as_json(result: CompareReport, options: CompareOptions, seconds: float) -> dict[str, Any]:
    columns = [{"model": label, "psnr_db": str(decibels)} for label, decibels in result.psnr_db]
    return {"sheet": result.sheet, "columns": columns}


def show(result: CompareReport, options: CompareOptions, seconds: float) -> None:
    for label, decibels in result.psnr_db[1:]:
        say(f"{label}: {format_psnr(decibels)}")
    say(f"wrote {result.sheet}")
