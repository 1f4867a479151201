"""Output of `recipe import`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from spectune.cli.console import print_warning, say, show_result
from spectune.errors import counted
from spectune.interop.kohya.importer import ImportedRecipe
from spectune.ops.options.training import ImportOptions
from spectune.ops.recipe_import import ImportReport


def prepare(options: ImportOptions) -> ImportOptions:
    return replace(options, command=sys.stdin.read()) if options.command == "-" else options


def exit_code(report: ImportReport) -> int:
    return 0 if report.understood else 1


def show(report: ImportReport, options: ImportOptions, seconds: float) -> None:
    if report.imported is None:
        say("This command trains nothing: with this learning rate it only rewrites the extract with the")
        say("keys, alpha and dtype of the trainer. No recipe was written.")
        if dtype := report.trainer_dtype:
            say(f"The trainer stores the factors in {dtype}. With --dtype {dtype}, the residual is computed")
            say("from factors in that dtype, so that the trainer rounds nothing.")
        say("`spectune split` writes the principal with these keys, and the residual. Run this instead:")
        assert report.replaced_by is not None
        show_result(report.replaced_by)
        return
    assert report.path is not None
    _print_flags(report.imported, report.path)


def as_json(report: ImportReport, options: ImportOptions, seconds: float) -> dict[str, Any]:
    imported = report.imported
    return {
        "recipe": None if report.path is None else str(report.path),
        "replaced_by": report.replaced_by,
        "understood": report.understood,
        "flags": []
        if imported is None
        else [
            {
                "flag": str(result.flag),
                "verdict": result.verdict,
                "settings": dict(result.settings),
                "why": result.why.removeprefix("; "),
            }
            for result in imported.results
        ],
        "notes": [] if imported is None else list(imported.notes),
    }


def _print_flags(imported: ImportedRecipe, out: Path) -> None:
    for result in imported.results:
        if result.verdict in ("taken", "ignored"):
            say(str(result))
        else:
            print_warning(str(result))
    for note in imported.notes:
        print_warning(note)
    unsupported = sum(result.verdict in ("unsupported", "unknown") for result in imported.results)
    if unsupported:
        total = counted(len(imported.results), "flag")
        say(
            f"{unsupported} of {total} have no counterpart in spectune; "
            "they are listed at the end of the recipe"
        )
    say(f"wrote {out}; to train, run: spectune train {out}")
