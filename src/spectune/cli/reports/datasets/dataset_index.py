"""Output of `dataset index`."""

from __future__ import annotations

from spectune.cli.console import say
from spectune.errors import counted, printable
from spectune.ops.dataset.indexing import IndexReport
from spectune.ops.options.dataset import IndexOptions

LISTED = 5  # names of each kind


def show(report: IndexReport, options: IndexOptions, seconds: float) -> None:
    for one in report.folders:
        changes = {"added": one.added, "changed": one.changed, "removed": one.removed}
        counts = ", ".join(f"{len(names):,} {word}" for word, names in changes.items())
        say(f"{one.file}: {counted(one.images, 'image')}, {one.nbytes / 1e6:,.1f} MB; {counts}")
        for word, names in changes.items():
            for name in names[:LISTED]:
                say(f"    {word}: {printable(name)}")
            if len(names) > LISTED:
                say(f"    {word}: ... {len(names) - LISTED:,} more")
    if not options.check:
        say("only the headers of new pictures were read: --check decodes all, which finds damaged ones")
