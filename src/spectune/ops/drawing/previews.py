"""Draw previews during a training: a folder of pictures for each step, and a sheet of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from spectune.errors import InputError, SpectuneError
from spectune.model.network import pictures_at_once
from spectune.model.offload import StagedModel
from spectune.ops.drawing.pictures import save_picture, save_pictures
from spectune.sampling.contact_sheet import picture_grid
from spectune.sampling.generate import Request, SampleSettings, check_sampler_name, find_sampler
from spectune.sampling.prompts import Prompt, read_prompts
from spectune.sampling.stages import draw_in_stages
from spectune.training.callbacks import Callbacks, RunStart
from spectune.training.recipe.recipe import Recipe

_CAPTIONS = 6  # pictures of a preview without prompts
_CELL_PX = 256


class Previews(Callbacks):
    """Draws the prompts of `run.preview`; without it validation captions, or else training captions.

    Args:
        recipe: The recipe of the run.
        saved: Called with the step, the pictures of a preview, and their prompts.

    Raises:
        InputError: The file of prompts cannot be read, or the recipe names an unknown sampler.
    """

    def __init__(
        self,
        recipe: Recipe,
        saved: Callable[[int, Sequence[Path], Sequence[str]], None] = lambda step, files, prompts: None,
    ) -> None:
        self._recipe, self._saved = recipe, saved
        edge = recipe.data.resolution_px
        sampler = check_sampler_name(recipe.run.preview_sampler)
        self._defaults = SampleSettings(
            width=edge, height=edge, sampler=sampler, max_tokens=recipe.data.caption.max_tokens
        )
        self._prompts: list[Prompt] = []
        self._notes: list[str] = []
        self._shown: set[str] = set()
        if recipe.run.preview is not None:
            self._prompts, self._notes = read_prompts(recipe.run.preview, self._defaults)

    def on_start(self, start: RunStart) -> None:
        if self._recipe.run.preview is None:
            captions = enumerate(start.captions[:_CAPTIONS])
            self._prompts = [Prompt(Request(caption, seed), self._defaults) for seed, caption in captions]

    def on_preview(self, step: int, model: StagedModel) -> Image.Image:
        prompts = self._current_prompts(model)
        drawn = self._draw(model, [self._fitted(prompt, model) for prompt in prompts])
        stem = f"{self._recipe.run.name}-step{step:08d}"
        folder = self._recipe.run.output / "previews" / stem
        for old in folder.glob(f"{stem}-*.png"):  # of an earlier process, perhaps with more prompts
            old.unlink()
        targets = [folder / f"{stem}-{number + 1:02d}.png" for number in drawn]
        captions = [prompts[number].request.caption for number in drawn]
        pictures = list(drawn.values())
        save_pictures(targets, captions, pictures)
        widest = max(max(picture.size) for picture in pictures)
        sheet = picture_grid(pictures, captions, cell_px=min(widest, _CELL_PX))
        save_picture(sheet, folder.with_name(f"{stem}.png"))
        self._saved(step, targets, captions)
        return sheet

    def _current_prompts(self, model: StagedModel) -> list[Prompt]:
        """Return the prompts as their file is now; if it cannot be read, as it was before."""
        file = self._recipe.run.preview
        if file is None:
            return self._prompts
        try:
            self._prompts, self._notes = read_prompts(file, self._defaults)
        except InputError as error:
            model.notify(f"warning: {error}; the preview uses the prompts that were read before")
        for note in self._notes:
            self._show_once(model, note)
        return self._prompts

    def _fitted(self, prompt: Prompt, model: StagedModel) -> Prompt:
        """Return the prompt with a sampler and a size that the model has."""
        settings = prompt.settings
        sampler, note = find_sampler(settings.sampler, model.sdxl.prediction)
        if note is not None:
            self._show_once(model, f"previews: {note}")
        step = model.sdxl.size_step
        width, height = (max(step, side - side % step) for side in (settings.width, settings.height))
        if (width, height) != (settings.width, settings.height):
            self._show_once(
                model,
                f"previews of {settings.width}x{settings.height} px are drawn with {width}x{height} px: "
                f"sides are multiples of {step} px",
            )
        batch = pictures_at_once(width * height)
        return replace(
            prompt,
            settings=replace(settings, sampler=sampler, width=width, height=height, batch=batch),
        )

    def _draw(self, model: StagedModel, prompts: list[Prompt]) -> dict[int, Image.Image]:
        """Return the pictures by the number of their prompt. Prompts with the same settings share a batch.

        If a size fails, for example because memory runs out, the pictures of other sizes are still drawn.
        """
        groups: dict[SampleSettings, list[int]] = {}
        for number, prompt in enumerate(prompts):
            groups.setdefault(prompt.settings, []).append(number)
        pictures: dict[int, Image.Image] = {}
        failure: Exception | None = None
        for settings, numbers in groups.items():
            requests = [prompts[number].request for number in numbers]
            try:
                drawn = draw_in_stages(model, requests, settings)
            except (SpectuneError, RuntimeError) as error:
                failure = error
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                model.notify(f"warning: no preview of {settings.width}x{settings.height}: {reason}")
            else:
                pictures |= dict(zip(numbers, drawn, strict=True))
        if failure is not None and not pictures:
            raise failure
        return dict(sorted(pictures.items()))

    def _show_once(self, model: StagedModel, note: str) -> None:
        if note not in self._shown:
            self._shown.add(note)
            model.notify(note)
