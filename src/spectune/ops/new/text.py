"""The settings of a new recipe, each with a comment for readers who never wrote one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectune.errors import counted
from spectune.ops.new.choices import Chosen, KnownPrediction, Length
from spectune.ops.new.pictures import FoundPictures
from spectune.ops.new.prompts import prompts_of, prompts_path
from spectune.training.memory.account import Setup
from spectune.training.recipe.commented import Setting, commented_recipe

LEARNING_RATE, SMALL_LEARNING_RATE = 1e-4, 4e-4

_REMARKS = {
    "model": "The checkpoint, and how much of each weight is trained.",
    "data": "The pictures. A caption is a .txt file of the same name beside its picture.",
    "objective": "What the model predicts. A wrong type gives noise instead of pictures.",
    "optimizer": "How strongly each step changes the model.",
    "run": "Length and files of the run.",
}


@dataclass(frozen=True)
class Parts:
    """Everything that the recipe is made from."""

    name: str
    out: Path
    model: Path
    prediction: KnownPrediction
    pictures: FoundPictures
    memory: Chosen
    length: Length


def recipe_of(parts: Parts, command: str) -> tuple[list[Setting], str]:
    """Return the settings and the text of the recipe."""
    settings = [*_model(parts), *_data(parts), *_training(parts), *_run(parts)]
    head = (
        f"{command}\nWritten by `spectune new` for {parts.model.name} and "
        f"{counted(len(parts.pictures.images), 'picture')}. All keys: docs/reference/recipe-keys.md"
    )
    tail = [
        f"Check the plan:         {command} --dry-run\nTrain:                  {command}\n"
        "Continue after a stop: the same command.",
    ]
    return settings, commented_recipe(settings, head=head, remarks=_REMARKS, tail=tail)


def _model(parts: Parts) -> Iterator[Setting]:
    setup, default = parts.memory.setup, Setup(rank=1)
    yield Setting("model.base", _path(parts.model, parts.out), "the checkpoint to train")
    yield Setting("model.rank", setup.rank, "singular directions per layer: more learn more, and take memory")
    if setup.form != default.form:
        yield Setting("model.form", setup.form, "needs less memory than the delta form")
    if setup.parts != default.parts:
        yield Setting("model.parts", list(setup.parts), "the text encoders are frozen: less memory")
    if setup.quantize != default.quantize:
        yield Setting("model.quantize", setup.quantize, "stores the frozen weights in fewer bits")
    yield Setting("objective.kind", parts.prediction.kind, parts.prediction.source)


def _data(parts: Parts) -> Iterator[Setting]:
    pictures = parts.pictures
    folder = _path(pictures.folder, parts.out)
    if pictures.is_flat:
        one: dict[str, Any] = {"path": folder}
        if pictures.caption:
            one["caption"] = pictures.caption
        yield Setting("data.sets", [one], "the folder of pictures")
    else:
        yield Setting("data.folders", [folder], "the parent of the `N_name` folders: N draws per epoch")
    if pictures.validation is not None:
        validation = _path(pictures.validation, parts.out)
        yield Setting("data.validation_folder", validation, "pictures that measure the loss, never trained")
    size = "pictures are scaled to the area of this square; sizes near it keep their aspect"
    yield Setting("data.resolution_px", parts.memory.setup.resolution_px, size)
    yield Setting("data.caption.dropout_probability", 0.1, "share of draws without caption, for CFG")


def _training(parts: Parts) -> Iterator[Setting]:
    rate = LEARNING_RATE if parts.memory.is_full_size else SMALL_LEARNING_RATE
    yield Setting("optimizer.name", parts.memory.setup.optimizer, "the usual optimizer")
    yield Setting("optimizer.learning_rate", rate, "too high: broken pictures; too low: no change")
    yield Setting("optimizer.schedule", "cosine", "the rate falls to 0 towards the end")
    if parts.length.warmup:
        yield Setting("optimizer.warmup_steps", parts.length.warmup, "the rate rises during these steps")


def _run(parts: Parts) -> Iterator[Setting]:
    length, setup = parts.length, parts.memory.setup
    draws = length.steps * setup.batch / len(parts.pictures.images)
    yield Setting("run.name", parts.name, "start of the names of all files")
    yield Setting("run.output", f"runs/{parts.name}", "folder of the results, beside this recipe")
    yield Setting("run.steps", length.steps, f"each picture is drawn about {draws:.0f} times")
    yield Setting("run.batch", setup.batch, "pictures per step")
    yield from _memory(parts.memory)
    yield Setting("run.save_every_steps", length.save_every, "adapters on the way, to choose the best")
    if prompts_of(parts.pictures.captions):
        yield Setting("run.preview", prompts_path(parts.out).name, "prompts of the previews, one per line")
    yield Setting("run.preview_every_steps", length.save_every, "a sheet of pictures in `previews`")
    if parts.pictures.validation is not None:
        yield Setting("run.validate_every_steps", length.save_every, "measures the validation loss")


def _memory(memory: Chosen) -> Iterator[Setting]:
    setup = memory.setup
    if memory.is_planned and not setup.gradient_checkpointing:
        yield Setting("run.gradient_checkpointing", False, "true needs less memory and is slower")
    if setup.trained_precision != "fp32":
        yield Setting("run.trained_precision", setup.trained_precision, "less memory")
    if setup.offload:
        yield Setting("run.offload", list(setup.offload), "these wait in main memory: less GPU memory")
    if setup.stream:
        yield Setting("run.stream", True, "frozen weights wait in main memory: slower, less GPU memory")


def _path(path: Path, out: Path) -> str:
    """Return a path below the recipe's folder relative to it, any other as an absolute path, with `/`."""
    # not `resolve`: the cache of the hub has links to files whose names have no extension
    folder, target = out.absolute().parent, path.absolute()
    return (target.relative_to(folder) if target.is_relative_to(folder) else target).as_posix()
