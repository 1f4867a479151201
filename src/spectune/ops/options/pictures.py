"""Options of the operations that draw: sample, compare."""

from __future__ import annotations

from dataclasses import KW_ONLY
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from spectune.errors import InputError
from spectune.files.text import is_storable
from spectune.model.vae.known import KNOWN_VAES
from spectune.operation import OperationOptions, argument, option, record
from spectune.ops.drawing.specs import parse_size
from spectune.ops.options.values import DRAWING_DEVICE_HELP, FORCE_HELP, ModelPath
from spectune.sampling.limits import MOST_GUIDANCE, MOST_PICTURES
from spectune.sdxl.vocabulary import CHUNK_TOKENS, MAX_TOKENS, MOST_TOKENS
from spectune.training.recipe.sections.base import LARGEST_FACTOR, LARGEST_SEED


@record
class DrawingOptions(OperationOptions):
    """The options of drawing that do not depend on the models."""

    _: KW_ONLY
    captions: tuple[str, ...] = option(default=(), flag="-c/--caption", help="A caption to draw.")
    captions_file: Path | None = option(
        default=None, flag="--captions", help="A text file with one caption per line."
    )
    seed: int = option(
        default=0,
        ge=0,
        le=LARGEST_SEED,
        help="Seed of the first picture. It increases by 1 for each further picture.",
    )
    size: str = option(default="1024", help="Pixels: 1024 or 1216x832 (width x height).")
    steps: int = option(default=25, ge=1, le=1000, help="Sampling steps.")
    cfg: float = option(default=5.0, ge=0, le=MOST_GUIDANCE, help="Guidance scale; 1 turns guidance off.")
    sampler: str = option(
        default="euler", help="For eps and v: euler, euler_a, ddim, dpmpp_2m. For flow: euler, heun."
    )
    negative: str = option(default="", help="Negative prompt.")
    max_tokens: int = option(
        default=MAX_TOKENS,
        ge=CHUNK_TOKENS,
        le=MOST_TOKENS,
        help="Tokens of a caption that are used, in chunks of 75, as data.caption.max_tokens in training.",
    )
    batch: int = option(default=4, ge=1, le=MOST_PICTURES, help="Pictures drawn at once.")
    device: str = option(default="auto", help=DRAWING_DEVICE_HELP)
    prediction: Literal["eps", "v", "flow"] | None = option(
        default=None, help="Prediction type, if the file does not declare it."
    )
    flow_shift: float | None = option(
        default=None, ge=0, le=LARGEST_FACTOR, help="Shift of flow sampling, if the file does not declare it."
    )
    vae: Path | None = option(
        default=None, help="Another autoencoder: a .safetensors file or a diffusers folder."
    )
    vae_name: str | None = option(
        default=None,
        help=f"Name of the latent scaling: {', '.join(KNOWN_VAES)}. Default: that of the training, otherwise "
        "the one that the files declare.",
    )

    @model_validator(mode="after")
    def _check_texts(self) -> Self:
        parse_size(self.size)
        if not all(map(is_storable, (*self.captions, self.negative))):
            raise InputError("a caption is not Unicode text", hint="the terminal may use another encoding")
        return self


@record
class SampleOptions(DrawingOptions):
    """Draw pictures with a checkpoint and any number of adapters."""

    model: ModelPath = argument(help="A checkpoint; or a residual, with its principal as the adapter.")
    adapters: tuple[str, ...] = argument(
        default=(), metavar="ADAPTER[:STRENGTH]...", help="Adapters to apply."
    )
    _: KW_ONLY
    out: Path = option(default=Path("pictures"), flag="-o", help="Folder for the pictures.")
    sheet: Path | None = option(
        default=None, help="Also write one sheet with all pictures and their captions."
    )
    metadata: bool = option(
        default=False, help="Also write metadata.jsonl, so that the folder can be used as a dataset."
    )
    force: bool = option(default=False, help=FORCE_HELP)


@record
class CompareOptions(DrawingOptions):
    """Draw the same captions and seeds with several models; write a contact sheet and print the PSNR."""

    models: tuple[str, ...] = argument(
        metavar="MODEL[+ADAPTER[:STRENGTH]]...",
        help="Models, each with any number of adapters; or folders of pictures.",
    )
    _: KW_ONLY
    out: Path = option(default=Path("compare.png"), flag="-o", help="The contact sheet to write.")
    cell: int = option(default=256, ge=32, le=2048, help="Width of each picture on the sheet, in pixels.")
    force: bool = option(default=False, help=FORCE_HELP)
