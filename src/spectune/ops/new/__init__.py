"""Write a recipe for a model, the card of this machine and a folder of pictures.

answers: questions to the user.
pictures: what the folder contains.
choices: prediction type, memory settings, steps.
prompts: the file of preview prompts.
text: the recipe with its comments.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spectune.checkpoints.open import open_checkpoint
from spectune.errors import quoted
from spectune.files.rename import replace_text
from spectune.files.writer import check_target
from spectune.operation import operation
from spectune.ops.new.answers import Answers
from spectune.ops.new.choices import choose_length, choose_memory, choose_prediction
from spectune.ops.new.pictures import find_pictures
from spectune.ops.new.prompts import prompts_path, write_prompts
from spectune.ops.new.text import Parts, recipe_of
from spectune.ops.options.training import NewOptions
from spectune.sdxl.inference import infer_layout
from spectune.training.data.names import name_of
from spectune.training.recipe.commented import Setting, nested
from spectune.training.recipe.recipe import parse_recipe
from spectune.training.trainable_model import check_trainable


@dataclass(frozen=True)
class NewReport:
    """The recipe that was written, the facts that it was made from, and the command that runs it."""

    path: Path
    text: str
    command: str
    pictures: int
    steps: int
    notes: tuple[str, ...]  # what was chosen and why
    warnings: tuple[str, ...]  # what to look at before training


@dataclass(frozen=True)
class Draft:
    """A recipe that is not written."""

    path: Path
    settings: tuple[Setting, ...]
    text: str
    command: str
    captions: tuple[str, ...]  # of the pictures; some become prompts
    pictures: int
    steps: int
    notes: tuple[str, ...]  # what was chosen and why
    warnings: tuple[str, ...]


@operation(NewOptions)
def new(options: NewOptions) -> NewReport:
    """Write a commented recipe for a model and a folder of pictures.

    Everything is inferred from the model, the card and the pictures. What they do not show is asked through
    `ask`; without it, the most common answer is used and a warning names it.

    Raises:
        InputError: The model cannot be trained, the folder has no usable picture, or the recipe exists.
    """
    check_target(_target(options), 0, force=options.force)
    made = draft(options)
    prompts = write_prompts(prompts_path(made.path), made.captions, force=options.force)
    replace_text(made.path, made.text)
    return NewReport(
        path=made.path,
        text=made.text,
        command=made.command,
        pictures=made.pictures,
        steps=made.steps,
        notes=(*made.notes, *prompts),
        warnings=made.warnings,
    )


def draft(options: NewOptions) -> Draft:
    """Return the recipe that `new` would write.

    Raises:
        InputError: The model cannot be trained, or the folder has no usable picture.
    """
    out = _target(options)
    answers = Answers(None if options.yes else options.ask)
    with open_checkpoint(options.model) as source:
        check_trainable(source)
        layout = infer_layout(source)
        prediction = choose_prediction(source, options.prediction, answers)
        pictures = find_pictures(options.folder, layout, answers)
        memory = choose_memory(source, layout, pictures, options, answers)
    vae = () if layout.vae else (f"{options.model.name} has no VAE: set vae.path to the file of one",)
    length = choose_length(len(pictures.images), memory.batch, options.steps)
    name = options.name or name_of(options.folder)
    parts = Parts(name, out, options.model, prediction, pictures, memory, length)
    command = f"spectune train {quoted(out)}"
    settings, text = recipe_of(parts, command)
    parse_recipe(nested(settings), label=out.name)
    return Draft(
        path=out,
        settings=tuple(settings),
        text=text,
        command=command,
        captions=tuple(pictures.captions),
        pictures=len(pictures.images),
        steps=length.steps,
        notes=(*memory.notes, *length.notes),
        warnings=(*answers.warnings, *vae, *pictures.warnings),
    )


def _target(options: NewOptions) -> Path:
    """Return the path of the recipe."""
    return options.out or Path(f"{options.name or name_of(options.folder)}.toml")
