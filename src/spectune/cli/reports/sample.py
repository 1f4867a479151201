"""Output of `sample`."""

from __future__ import annotations

from spectune.cli.console import say
from spectune.cli.report_parts import say_device
from spectune.errors import counted
from spectune.ops.options.pictures import SampleOptions
from spectune.ops.sample import SampleReport


def prepare(options: SampleOptions) -> SampleOptions:
    say_device(options)
    return options


def show(result: SampleReport, options: SampleOptions, seconds: float) -> None:
    say(f"wrote {counted(len(result.pictures), 'picture')} to {result.folder}")
    if result.sheet is not None:
        say(f"wrote {result.sheet}")
