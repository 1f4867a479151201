"""Train a recipe to its end, or continue from its newest state."""

from __future__ import annotations

from dataclasses import dataclass

from spectune.model.device import parse_device
from spectune.model.memory_errors import explained_memory_errors
from spectune.operation import operation
from spectune.ops.drawing.previews import Previews
from spectune.ops.options.training import TrainOptions
from spectune.training.callbacks import TrainReport
from spectune.training.loop import train as run_training
from spectune.training.memory.remedies import remedies
from spectune.training.recipe.defaults import with_defaults
from spectune.training.recipe.file import load_recipe
from spectune.training.recipe.recipe import Recipe


@operation(TrainOptions)
def train(options: TrainOptions) -> TrainReport:
    """Train a recipe to its end, or continue from its newest state.

    An override looks like "run.steps=200". Previews are drawn if the recipe requests them.
    """
    recipe = load_recipe(options.recipe, options.overrides)
    callbacks = [*(options.callbacks or ()), Previews(recipe)]
    with explained_memory_errors(lambda: remedies(_with_defaults(recipe))):
        return run_training(recipe, callbacks=callbacks, force=options.force)


@dataclass(frozen=True)
class TrainForecast:
    """The recipe that would run, with overrides applied and defaults filled in."""

    recipe: Recipe


def plan_train(options: TrainOptions) -> TrainForecast:
    """Check a recipe without running it. Defaults that depend on the base need its file."""
    recipe = load_recipe(options.recipe, options.overrides)
    Previews(recipe)  # reads the prompts
    return TrainForecast(_with_defaults(recipe) if recipe.model.checkpoint.exists() else recipe)


def _with_defaults(recipe: Recipe) -> Recipe:
    return with_defaults(recipe, parse_device(recipe.run.device))
