"""Types and help texts that several records use."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ValidationInfo

from spectune.errors import InputError
from spectune.files.dtype_names import dtype_name
from spectune.files.model_folders.search import find_model
from spectune.pairs.strength import ModelWeights, parse_weights

# 8-bit types are precise enough for full weights, but not for factors and residuals.
FactorDtype = Annotated[Literal["float16", "bfloat16", "float32"], BeforeValidator(dtype_name)]
ResidualDtype = Annotated[Literal["float16", "bfloat16", "float32", "float64"], BeforeValidator(dtype_name)]
WeightDtype = Annotated[
    Literal["float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2"], BeforeValidator(dtype_name)
]


def _spelling_name(word: object) -> str:
    """Return the name of a spelling. PEFT is another name for the diffusers spelling."""
    name = str(word).lower()
    return "diffusers" if name == "peft" else name


Keys = Annotated[Literal["kohya", "diffusers", "comfyui"], BeforeValidator(_spelling_name)]


def _found_model(path: Path, info: ValidationInfo) -> Path:
    # `notify` is a field of all records, declared before theirs: it is already validated
    return find_model(path, (info.data or {}).get("notify"))


# A path; the name of a model in the user's model folders; or hub:owner/name.
ModelPath = Annotated[Path, AfterValidator(_found_model)]

LAYERS_HELP = (
    "The layers: default (LyCORIS preset=full), all, or a comma-separated list of names, parts, blocks and "
    'patterns: "unet,!conv", "te1.*", "down.1".'
)
KEYS_HELP = (
    "Spelling of the keys: kohya (all programs load it), diffusers (PEFT), comfyui (diffusion_model.)."
)
BASE_HELP = "The model of the adapters. Required if it does not have the size of SDXL."
DEVICE_HELP = "Device for the SVD: auto, cpu, cuda or cuda:1."
DRAWING_DEVICE_HELP = "Device: auto, cpu, cuda, cuda:1 or mps. auto is the GPU if there is one."
CARD_HELP = (
    "Also write a model card (Markdown) beside the output: base, recipe, pictures, steps, losses, previews. "
    "What is not recorded is called unknown."
)
FORCE_HELP = "Overwrite existing files."

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Slice:
    """A file, the trait that selects its layers (None selects all), and the weight of the layers."""

    path: Path
    trait: str | None = None
    weight: float = 1.0

    def __str__(self) -> str:
        trait = "" if self.trait is None else f":{self.trait}"
        return f"{self.path.name}{trait}" + ("" if self.weight == 1 else f" x {self.weight:g}")


def parse_slice(word: str | Path | Slice, *, find: Callable[[Path], Path] = find_model) -> Slice:
    """Parse `FILE`, `FILE:TRAIT`, `FILE:TRAIT:WEIGHT` or `FILE:WEIGHT`; `find` returns the path of a file.

    The colon of a drive letter belongs to the file. If a file or folder whose name contains a colon exists,
    the longest such name is used.
    """
    if isinstance(word, Slice):
        return word
    path, trait, weight = _split_slice(str(word))
    if trait is not None and weight is None and _NUMBER.fullmatch(trait):
        trait, weight = None, trait
    if weight is not None and not _NUMBER.fullmatch(weight):
        raise InputError(f"the weight in {word!r} is {weight!r}: expected a number like 0.8")
    number = 1.0 if weight is None else float(weight)
    if not math.isfinite(number):
        raise InputError(f"the weight in {word!r} is {number}: expected a finite number")
    return Slice(find(Path(path)), trait, number)


def _split_slice(word: str) -> tuple[str, str | None, str | None]:
    for colons in range(3):
        path, *rest = word.rsplit(":", colons)
        if path and Path(path).exists():
            trait, weight = (*rest, None, None)[:2]
            return path, trait or None, weight
    match = re.fullmatch(r"(.*?\.safetensors)(?::([^:]*))?(?::([^:]*))?", word, re.IGNORECASE)
    if match is None:
        raise InputError(
            f"cannot parse slice {word!r}: expected FILE[:TRAIT[:WEIGHT]]",
            hint="for example style.safetensors:te or style.safetensors:unet:0.8",
        )
    return match[1], match[2] or None, match[3]


@dataclass(frozen=True)
class Summand:
    """A checkpoint of a weighted sum; without weights it gets what the others lack to a sum of 1."""

    path: Path
    weights: ModelWeights | None = None

    def __str__(self) -> str:
        return "the rest" if self.weights is None else str(self.weights)


def parse_summand(word: str | Path | Summand) -> Summand:
    """Parse `FILE` or `FILE:WEIGHTS`: the text after the last colon is a weight if it looks like one."""
    if isinstance(word, Summand):
        return word
    path, colon, text = str(word).rpartition(":")
    is_weight = (
        _NUMBER.fullmatch(text.partition(",")[0]) or "=" in text or path.lower().endswith(".safetensors")
    )
    if not colon or not path or not is_weight or re.search(r"[/\\]", text) or Path(word).exists():
        return Summand(find_model(Path(word)))
    return Summand(find_model(Path(path)), parse_weights(text))


ParsedSummand = Annotated[Summand, BeforeValidator(parse_summand)]
ParsedSlice = Annotated[Slice, BeforeValidator(parse_slice)]


def check_one_rank(rank: object, conv_rank: object, energy: object, size: object, *, size_name: str) -> None:
    """Raise InputError if more than one option sets the ranks."""
    values = {"rank": rank, "energy": energy, size_name: size}
    passed = [f"`{name}`" for name, value in values.items() if value is not None]
    if len(passed) > 1:
        raise InputError(f"{' and '.join(passed)} exclude each other", hint="pass only one of them")
    if conv_rank is not None and passed not in ([], ["`rank`"]):
        raise InputError(f"`conv_rank` and {passed[0]} exclude each other", hint="leave out `conv_rank`")
