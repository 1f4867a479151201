"""Output of `train --dry-run`: the plan on stderr, the effective values as TOML on stdout."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import tomlkit

from spectune.cli.console import megabytes, print_warning, say, show_result, table
from spectune.errors import counted

if TYPE_CHECKING:
    from spectune.ops.forecast import PictureCounts, RunSchedule, Space, TrainForecast

SHOWN_SIZES = 6


def show(forecast: TrainForecast) -> None:
    """Print the plan."""
    for warning in forecast.warnings:
        print_warning(warning)
    schedule = forecast.schedule
    rows = [
        ("base", f"{forecast.base}, trained as {forecast.recipe.objective.kind}"),
        ("device", forecast.device),
        ("trained", _trained(forecast)),
        ("pictures", _pictures(forecast.pictures)),
        ("sizes", _sizes(forecast.pictures)),
        ("steps", _steps(schedule)),
        ("on the way", _between(schedule)),
        ("memory", _space(forecast.memory)),
        ("latents", forecast.latents),
        ("saves", forecast.saves),
        ("disk", _space(forecast.disk)),
        ("result", f"{forecast.recipe.run.output / forecast.recipe.run.name}.safetensors"),
    ]
    table("plan; nothing was written", ("", "this run"), rows, left=2)
    if forecast.chosen:
        say(f"chosen for a base of SDXL's size: {forecast.chosen}")
    say("effective values that differ from the defaults, and those that depend on the base:")
    show_result(tomlkit.dumps(effective(forecast)).rstrip())
    for problem in forecast.problems:
        print_warning(problem)


def exit_code(forecast: TrainForecast) -> int:
    """Return 1 if the run would stop."""
    return 1 if forecast.problems else 0


def as_json(forecast: TrainForecast) -> dict[str, Any]:
    """Return everything for `--json`."""
    return {
        **asdict(forecast),
        "recipe": forecast.recipe.model_dump(mode="json"),
        "problems": list(forecast.problems),
    }


def effective(forecast: TrainForecast) -> dict[str, Any]:
    """Return the values that the run uses, without keys that have their default, and without nulls."""
    return forecast.recipe.model_dump(mode="json", exclude_none=True, exclude_defaults=True)


def _trained(forecast: TrainForecast) -> str:
    model, run = forecast.recipe.model, forecast.recipe.run
    if model.is_full:
        return f"complete tensors of {', '.join(model.parts)}, {run.precision} model"
    file = "start" if model.start else "principal"
    rank = f"ranks of the {file}" if model.rank is None else f"rank {model.rank}"
    return f"{', '.join(model.parts)} at {rank}, {model.form} form, {run.precision} model"


def _pictures(pictures: PictureCounts) -> str:
    draws = "" if pictures.draws_per_epoch == pictures.training else f", {pictures.draws_per_epoch:,} draws"
    return f"{pictures.training:,} per epoch{draws}; {pictures.validation:,} for validation"


def _sizes(pictures: PictureCounts) -> str:
    shown = [f"{count} at {size}" for size, count in list(pictures.sizes.items())[:SHOWN_SIZES]]
    rest = len(pictures.sizes) - len(shown)
    return ", ".join(shown) + (f", {counted(rest, 'more size')}" if rest else "")


def _steps(schedule: RunSchedule) -> str:
    resumed = f", continues after step {schedule.first_step:,}" if schedule.first_step else ""
    return (
        f"{schedule.steps:,} of {counted(schedule.pictures_per_step, 'picture')}{resumed}; "
        f"{schedule.steps_per_epoch:.1f} per epoch, {schedule.epochs:.1f} epochs"
    )


def _between(schedule: RunSchedule) -> str:
    words = [
        counted(schedule.saves, "save"),
        counted(schedule.previews, "preview"),
        counted(schedule.validations, "validation"),
    ]
    return ", ".join(words)


def _space(space: Space) -> str:
    available = "" if space.available is None else f"; {megabytes(space.available)} available"
    return f"about {megabytes(space.required)}{available}"
