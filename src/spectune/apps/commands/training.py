"""The command that trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spectune.apps.console import err, print_json, print_warning, say
from spectune.train.callbacks import ConsoleProgress, TrainReport
from spectune.train.loop import train as run_training
from spectune.train.recipe import load_recipe


def train(path: Path, overrides: Sequence[str], *, force: bool, dry_run: bool, as_json: bool) -> bool:
    """Whether the run reached its end."""
    recipe = load_recipe(path, overrides)
    if dry_run:
        print(recipe.model_dump_json(indent=2))
        return True
    report = run_training(recipe, callbacks=[ConsoleProgress(err)], force=force)
    if as_json:
        print_json(report)
    else:
        print_report(report)
    return not report.interrupted


def print_report(report: TrainReport) -> None:
    for warning in report.warnings:
        print_warning(warning)
    done = report.steps - report.first_step
    say(
        f"{'stopped' if report.interrupted else 'finished'} at step {report.steps}; "
        f"{done} steps took {report.seconds:.0f} s"
    )
    if report.validation_before is not None and report.validation_after is not None:
        say(f"held-out loss {report.validation_before:.4f} before, {report.validation_after:.4f} after")
    for file in report.files:
        say(f"wrote {file}")
    if report.interrupted:
        say("run the same command again to go on from here")
