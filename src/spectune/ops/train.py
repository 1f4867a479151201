"""Train a recipe to its end, or continue from its newest state."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from spectune.model.device import parse_device
from spectune.model.memory_errors import explained_memory_errors
from spectune.model.offload import StagedModel
from spectune.operation import operation
from spectune.ops.options.training import TrainOptions
from spectune.sampling.contact_sheet import picture_grid
from spectune.sampling.generate import Request, SampleSettings
from spectune.sampling.stages import draw_in_stages
from spectune.training.callbacks import Callbacks, TrainReport
from spectune.training.data.folders import scan_training, scan_validation
from spectune.training.loop import train as run_training
from spectune.training.memory.remedies import remedies
from spectune.training.recipe.defaults import with_defaults
from spectune.training.recipe.file import load_recipe
from spectune.training.recipe.recipe import Recipe

PREVIEWS = 6  # pictures on a preview sheet


class Previews(Callbacks):
    """Draws a preview sheet of validation captions, or of training captions if there are none."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def on_preview(self, step: int, model: StagedModel) -> Image.Image:
        captions = self._captions()
        edge = self._recipe.data.resolution_px
        # fewer large pictures at once: sampling should need less memory than a training step
        batch = min(SampleSettings.batch, max(1, 1024 * 1024 // edge**2))
        max_tokens = self._recipe.data.caption.max_tokens
        how = SampleSettings(width=edge, height=edge, batch=batch, max_tokens=max_tokens)
        requests = [Request(caption, seed) for seed, caption in enumerate(captions)]
        target = self._recipe.run.output / "previews" / f"{self._recipe.run.name}-step{step:08d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        sheet = picture_grid(draw_in_stages(model, requests, how), captions, cell_px=min(edge, 256))
        sheet.save(target)
        return sheet

    def _captions(self) -> list[str]:
        data = self._recipe.data
        scan = scan_validation(data) or scan_training(data)
        return list(dict.fromkeys(image.caption for image in scan.images))[:PREVIEWS]


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
    return TrainForecast(_with_defaults(recipe) if recipe.model.checkpoint.exists() else recipe)


def _with_defaults(recipe: Recipe) -> Recipe:
    return with_defaults(recipe, parse_device(recipe.run.device))
