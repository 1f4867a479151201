"""Options of the operations around training: new, train, plan, recipe import, demo, doctor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from spectune.operation import OperationOptions, argument, hook, option, record
from spectune.ops.options.values import FORCE_HELP, ModelPath
from spectune.training.recipe.sections.base import MOST_IMAGES, MOST_PX, MOST_RANK, MOST_STEPS


@record
class TrainOptions(OperationOptions):
    """Train a recipe, or continue from the last saved state. Ctrl-C saves the state and stops."""

    recipe: Path | dict[str, Any] | BaseModel = argument(help="A training recipe in TOML.")
    _: KW_ONLY
    overrides: tuple[str, ...] = option(
        default=(),
        flag="--set",
        help="Override a key of the recipe: section.key=value, for a list section.key=one,two.",
    )
    force: bool = option(default=False, help=FORCE_HELP)
    callbacks: tuple[Any, ...] | None = hook(default=None, help="Instances of spectune.Callbacks.")
    show_progress: bool = hook(default=True, help="Show the progress on stderr or in the notebook.")


@record
class NewOptions(OperationOptions):
    """Write a recipe for a model and a folder of pictures, with comments, and print the command to run it.

    Prediction type, rank, memory settings, steps and folders are inferred. On a terminal, what cannot be
    inferred is asked.
    """

    model: ModelPath = argument(help="The checkpoint to train.")
    folder: Path = argument(help="The folder with the pictures, or the parent of `N_name` folders.")
    _: KW_ONLY
    out: Path | None = option(
        default=None, flag="-o", help="The recipe to write. Default: the name of the folder, with .toml."
    )
    name: str | None = option(default=None, help="Name of the run. Default: the name of the folder.")
    prediction: Literal["eps", "v", "flow"] | None = option(
        default=None, help="Prediction type, if the checkpoint does not declare it."
    )
    vram: str | int | None = option(
        default=None,
        help="Memory of the card that will train: 12GB. "
        "Default: this machine's card, less 7 % for the desktop.",
    )
    rank: int | None = option(
        default=None,
        ge=1,
        le=MOST_RANK,
        help="Singular directions trained per layer, if the card has the memory.",
    )
    steps: int | None = option(
        default=None, ge=1, le=MOST_STEPS, help="Training steps. Default: by the number of pictures."
    )
    yes: bool = option(default=False, help="Ask nothing: take the most likely value and warn about it.")
    force: bool = option(default=False, help=FORCE_HELP)
    ask: Callable[[str, str, Sequence[str]], str] | None = hook(
        default=None, help="Called with a question, its default and the choices; returns the reply."
    )


@record
class PlanOptions(OperationOptions):
    """Find the rank, form, precision and checkpointing that fit a GPU. The recipe is printed on stdout."""

    model: ModelPath = argument(help="The original checkpoint.")
    _: KW_ONLY
    vram: str | int | None = option(
        default=None,
        help="Memory of the GPU: 12GB; or less, such as 11.5GiB, if a desktop uses some of it. "
        "Default: this machine's card, less 7 % for the desktop.",
    )
    rank: int = option(default=64, ge=1, le=MOST_RANK, help="Singular directions trained per layer.")
    full: bool = option(default=False, help='Plan full fine-tuning (`rank = "full"`) instead of a rank.')
    parts: str = option(default="unet,te1,te2", help="The parts to train, separated by commas.")
    resolution: int = option(default=1024, ge=16, le=MOST_PX, help="Side of a square picture in pixels.")
    batch: int = option(default=1, ge=1, le=MOST_IMAGES, help="Pictures per forward pass.")
    optimizer: str = option(default="adamw", help="Name of the optimizer, as in recipes.")
    ema: bool = option(default=False, help="Keep a moving average of the trained tensors.")
    activations: bool = option(
        default=False, help="Also list the activations of other sizes and batches (takes a minute or two)."
    )


@record
class ImportOptions(OperationOptions):
    """Convert a command of kohya's sd-scripts to a recipe, and report the result for each flag.

    The exit code is 1 if a flag is unknown or has no counterpart.
    """

    command: str = argument(
        metavar="TEXT_OR_FILE",
        help="The command in quotes; a .bat, .sh, .ps1 or .txt file with the command; a .toml configuration; "
        "a .json file of kohya_ss settings; or - for standard input.",
    )
    out: Path = option(default=Path("recipe.toml"), flag="-o", help="The recipe to write.")
    _: KW_ONLY
    force: bool = option(default=False, help=FORCE_HELP)


@record
class DemoOptions(OperationOptions):
    """Run all steps on a tiny embedded SDXL: split, verify, train, rebuild, export, compare."""

    out: Path = option(default=Path("spectune-demo"), flag="-o", help="Folder for the files of the demo.")
    _: KW_ONLY
    steps: int | None = option(
        default=None, ge=0, le=MOST_STEPS, help="Training steps. Default: as in the recipe of the demo."
    )


@record
class DoctorOptions(OperationOptions):
    """Check this machine: Python, torch, cards, memory, optional packages, disk speed, accelerate's file.

    Each problem is a warning with its remedy. The exit code is 0 with warnings too.
    """

    folder: Path = option(
        default=Path(),
        help="Folder whose disk is measured, with a temporary file of 64 MB.",
    )
