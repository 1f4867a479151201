"""Output of `train`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectune.cli.console import err, say
from spectune.cli.job import INTERRUPTED, Job
from spectune.cli.reports.starting import dry_run
from spectune.cli.training_events import TrainingEvents
from spectune.errors import quoted
from spectune.ops.options.training import TrainOptions
from spectune.training.callbacks import TrainReport
from spectune.training.callbacks.console import ConsoleProgress
from spectune.training.recipe.file import load_recipe
from spectune.training.recipe.recipe import Recipe

if TYPE_CHECKING:
    from spectune.ops.forecast import TrainForecast


def prepare(options: TrainOptions) -> TrainOptions:
    return replace(options, callbacks=(*(options.callbacks or ()), ConsoleProgress(err)))


def events(options: TrainOptions, job: Job) -> TrainOptions:
    return replace(options, callbacks=(*(options.callbacks or ()), TrainingEvents(job)))


def exit_code(report: TrainReport) -> int:
    return INTERRUPTED if report.interrupted else 0


def show_dry_run(forecast: TrainForecast, options: TrainOptions) -> None:
    dry_run.show(forecast)


dry_run_json, dry_run_exit_code = dry_run.as_json, dry_run.exit_code


def as_json(report: TrainReport, options: TrainOptions, seconds: float) -> dict[str, Any]:
    return asdict(report)


def show(report: TrainReport, options: TrainOptions, seconds: float) -> None:
    done = report.steps - report.first_step
    say(
        f"{'stopped' if report.interrupted else 'finished'} at step {report.steps}; "
        f"{done} steps took {report.seconds:.0f} s"
    )
    if report.validation_before is not None and report.validation_after is not None:
        say(f"validation loss {report.validation_before:.4f} before, {report.validation_after:.4f} after")
    for file in report.files:
        say(f"wrote {file}")
    if report.interrupted:
        say("to continue from this step, run the same command again")
        return
    say("next, as you need:")
    for command in commands_after_training(load_recipe(options.recipe, options.overrides)):
        say(f"  {command}")


def commands_after_training(recipe: Recipe, *, folder: Path | None = None) -> list[str]:
    """Return the commands that turn the result of a recipe into a checkpoint, a LoRA and pictures.

    cmd, PowerShell and bash read their paths alike.

    Args:
        recipe: A recipe whose training is finished.
        folder: The working directory, to which paths are relative where possible.
    """
    output, name = recipe.run.output, recipe.run.name
    base, tuned, checkpoint, lora, pictures = (
        quoted(_from(path, folder or Path.cwd()))
        for path in (
            recipe.model.checkpoint,
            output / f"{name}.safetensors",
            output / f"{name}-checkpoint.safetensors",
            output / f"{name}-lora.safetensors",
            output / f"{name}-pictures",
        )
    )
    size, vae = recipe.data.resolution_px, ""
    if recipe.vae.path is not None:
        vae = f" --vae {quoted(_from(recipe.vae.path, folder or Path.cwd()))}"
    return [
        f"spectune rebuild {base} {tuned} -o {checkpoint}",
        f"spectune export {base} {tuned} -o {lora}",
        f'spectune sample {base} {tuned} -c "a picture" --size {size}{vae} -o {pictures}',
    ]


def _from(path: Path, folder: Path) -> Path:
    absolute = folder / path
    if not absolute.is_relative_to(folder):
        return absolute
    relative = absolute.relative_to(folder)
    return absolute if str(relative).startswith("-") else relative  # else it would be an option
