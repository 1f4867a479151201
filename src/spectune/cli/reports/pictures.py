"""Output of `sample` and `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectune.cli.console import say
from spectune.cli.report_parts import say_device
from spectune.errors import counted
from spectune.ops.compare import CompareReport
from spectune.ops.options.pictures import CompareOptions, SampleOptions
from spectune.ops.sample import SampleReport
from spectune.sampling.contact_sheet import format_psnr


def prepare(options: SampleOptions | CompareOptions) -> SampleOptions | CompareOptions:
    if isinstance(options, SampleOptions) or not all(Path(word).is_dir() for word in options.models):
        say_device(options)  # `compare` only reads folders of pictures
    return options


def as_json(result: CompareReport, options: CompareOptions, seconds: float) -> dict[str, Any]:
    columns = [{"model": label, "psnr_db": str(decibels)} for label, decibels in result.psnr_db]
    return {"sheet": result.sheet, "columns": columns}


def show(
    result: SampleReport | CompareReport, options: SampleOptions | CompareOptions, seconds: float
) -> None:
    if isinstance(result, SampleReport):
        say(f"wrote {counted(len(result.pictures), 'picture')} to {result.folder}")
    else:
        for label, decibels in result.psnr_db[1:]:
            say(f"{label}: {format_psnr(decibels)}")
    if result.sheet is not None:
        say(f"wrote {result.sheet}")
