"""Types of options that several records use."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator

from spectune.errors import InputError
from spectune.files.dtype_names import dtype_name

# Eight bits hold a whole weight, roughly; for factors and residuals they are too few.
FactorDtype = Annotated[Literal["float16", "bfloat16", "float32"], BeforeValidator(dtype_name)]
ResidualDtype = Annotated[Literal["float16", "bfloat16", "float32", "float64"], BeforeValidator(dtype_name)]
WeightDtype = Annotated[
    Literal["float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2"], BeforeValidator(dtype_name)
]


def _spelling_name(word: object) -> str:
    """Return the name of a spelling; PEFT is another name for that of diffusers."""
    name = str(word).lower()
    return "diffusers" if name == "peft" else name


Keys = Annotated[Literal["kohya", "diffusers", "comfyui"], BeforeValidator(_spelling_name)]


LAYERS_HELP = (
    "The layers: default (LyCORIS preset=full), all, or names, parts, blocks and patterns, separated by "
    "commas: 'unet,!conv', 'te1.*', 'down.1'."
)
KEYS_HELP = "Spelling of the keys: kohya (loads everywhere), diffusers (PEFT), comfyui (diffusion_model.)."
BASE_HELP = "The model that the adapters are for. Required where it does not have SDXL's size."
DEVICE_HELP = "Where to factor: auto, cpu, cuda or cuda:1."
FORCE_HELP = "Overwrite existing files."

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Slice:
    """A file, the trait that selects its layers (None selects all), and the weight of these layers."""

    path: Path
    trait: str | None = None
    weight: float = 1.0

    def __str__(self) -> str:
        trait = "" if self.trait is None else f":{self.trait}"
        return f"{self.path.name}{trait}" + ("" if self.weight == 1 else f" x {self.weight:g}")


def parse_slice(word: str | Path | Slice) -> Slice:
    """Read `FILE`, `FILE:TRAIT`, `FILE:TRAIT:WEIGHT` or `FILE:WEIGHT`.

    The colon of a drive letter belongs to the file. A file or folder that exists under a longer name is
    that file.
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
    return Slice(Path(path), trait, number)


def _split_slice(word: str) -> tuple[str, str | None, str | None]:
    for colons in range(3):
        path, *rest = word.rsplit(":", colons)
        if path and Path(path).exists():
            trait, weight = (*rest, None, None)[:2]
            return path, trait or None, weight
    match = re.fullmatch(r"(.*?\.safetensors)(?::([^:]*))?(?::([^:]*))?", word, re.IGNORECASE)
    if match is None:
        raise InputError(
            f"unreadable slice {word!r}", hint="write it like style.safetensors:te or x.safetensors:unet:0.8"
        )
    return match[1], match[2] or None, match[3]


ParsedSlice = Annotated[Slice, BeforeValidator(parse_slice)]


def check_one_rank(rank: object, conv_rank: object, energy: object, size: object, *, size_name: str) -> None:
    """Raise InputError when ranks are chosen in two ways at once."""
    values = {"rank": rank, "energy": energy, size_name: size}
    given = [f"`{name}`" for name, value in values.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} exclude each other", hint="choose one of them")
    if conv_rank is not None and given not in ([], ["`rank`"]):
        raise InputError(f"`conv_rank` and {given[0]} exclude each other", hint="leave out `conv_rank`")
