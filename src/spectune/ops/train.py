"""Train a recipe to its end, or continue from its newest state.

The networks are imported after the recipe was checked, because they take seconds to load.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from spectune.model.device import parse_device
from spectune.model.memory_errors import explained_memory_errors
from spectune.operation import operation
from spectune.ops.options.training import TrainOptions
from spectune.training.callbacks import CallbackList, Callbacks, TrainReport
from spectune.training.callbacks.console import ConsoleProgress
from spectune.training.memory.remedies import remedies
from spectune.training.recipe.defaults import with_defaults
from spectune.training.recipe.file import check_paths, load_recipe
from spectune.training.recipe.recipe import Recipe

if TYPE_CHECKING:
    from spectune.ops.forecast import TrainForecast


@operation(TrainOptions)
def train(options: TrainOptions) -> TrainReport:
    """Train a recipe to its end, or continue from its newest state.

    An override looks like "run.steps=200". Previews are drawn if the recipe requests them. In Python,
    `recipe` may also be a dict of its sections or a Recipe, `callbacks` are instances of
    `spectune.Callbacks`, and `show_progress=False` turns the progress line off.
    """
    recipe = _checked_recipe(options)

    from spectune.ops.drawing.previews import Previews
    from spectune.training.callbacks.loss_curve import LossCurve
    from spectune.training.loop import train as run_training

    given: list[Callbacks] = list(options.callbacks or ())
    if options.show_progress and not any(isinstance(one, ConsoleProgress) for one in given):
        given.append(ConsoleProgress())
    observers = CallbackList(given)
    curve = LossCurve(recipe.run.output, recipe.run.name, observers.on_message)
    previews = Previews(recipe, observers.on_preview_files)
    with explained_memory_errors(lambda: remedies(_with_defaults(recipe))):
        report = run_training(recipe, callbacks=[*given, previews, curve], force=options.force)
    return replace(report, files=(*report.files, *curve.files))


def plan_train(options: TrainOptions) -> TrainForecast:
    """Check everything that a run needs without running it."""
    recipe = _checked_recipe(options)

    from spectune.ops.drawing.previews import Previews
    from spectune.ops.forecast import forecast

    Previews(recipe)  # reads the prompts
    return forecast(recipe, force=options.force)


def _checked_recipe(options: TrainOptions) -> Recipe:
    recipe = load_recipe(options.recipe, options.overrides)
    check_paths(recipe)
    return recipe


def _with_defaults(recipe: Recipe) -> Recipe:
    return with_defaults(recipe, parse_device(recipe.run.device))
