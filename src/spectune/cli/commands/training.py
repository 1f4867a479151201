"""The command that trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from spectune.cli.console import err, print_json, print_warning, say
from spectune.model.network import Sdxl
from spectune.sampling.contact_sheet import picture_grid
from spectune.sampling.generate import Request, SampleSettings, generate
from spectune.training.callbacks import Callbacks, ConsoleProgress, TrainReport
from spectune.training.data.gather import scan_training, scan_validation
from spectune.training.loop import train as run_training
from spectune.training.recipe.file import load_recipe
from spectune.training.recipe.recipe import Recipe

PREVIEWS = 6  # pictures on a preview sheet


class Previews(Callbacks):
    """A sheet of held-out captions, or trained ones where nothing is held out, as the recipe asks."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def on_preview(self, step: int, model: Sdxl) -> Image.Image:
        captions = self._captions()
        edge = self._recipe.data.resolution_px
        how = SampleSettings(width=edge, height=edge)
        requests = [Request(caption, seed) for seed, caption in enumerate(captions)]
        target = self._recipe.run.output / "previews" / f"{self._recipe.run.name}-step{step:08d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        sheet = picture_grid(generate(model, requests, how), captions, cell_px=min(edge, 256))
        sheet.save(target)
        return sheet

    def _captions(self) -> list[str]:
        data = self._recipe.data
        scan = scan_validation(data) or scan_training(data)
        return list(dict.fromkeys(image.caption for image in scan.images))[:PREVIEWS]


def train(path: Path, overrides: Sequence[str], *, force: bool, dry_run: bool, as_json: bool) -> bool:
    """Whether the run reached its end."""
    recipe = load_recipe(path, overrides)
    if dry_run:
        print(recipe.model_dump_json(indent=2))
        return True
    report = run_training(recipe, callbacks=[ConsoleProgress(err), Previews(recipe)], force=force)
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
