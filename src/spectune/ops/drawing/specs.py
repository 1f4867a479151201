"""Parse models with adapters: `base.safetensors+style.safetensors:0.8`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spectune.errors import InputError
from spectune.files.model_folders.search import find_model
from spectune.sampling.limits import LARGEST_SIDE, SMALLEST_SIDE


@dataclass(frozen=True)
class ImageSize:
    """The size of a picture in pixels."""

    width: int
    height: int


def parse_size(word: str) -> ImageSize:
    """Parse `1024` or `1216x832` (width x height)."""
    match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", word.strip().lower())
    sides = [] if match is None else [int(side) for side in match.groups() if side]
    if not all(SMALLEST_SIDE <= side <= LARGEST_SIDE for side in sides):
        raise InputError(
            f"`size` is {word}: expected sides of {SMALLEST_SIDE} to {LARGEST_SIDE:,} pixels",
            hint="for example 1024 or 1216x832",
        )
    if not sides:
        raise InputError(
            f"cannot parse `size` {word!r}: expected pixels", hint="for example 1024 or 1216x832"
        )
    return ImageSize(width=sides[0], height=sides[-1])


@dataclass(frozen=True)
class Weighted:
    """An adapter file and its strength."""

    path: Path
    strength: float

    @property
    def label(self) -> str:
        return self.path.stem if self.strength == 1.0 else f"{self.path.stem}:{self.strength:g}"


def parse_weighted(word: str) -> Weighted:
    """Parse `style.safetensors` or `style.safetensors:0.8`. A path may begin with a drive letter."""
    path, colon, number = word.rpartition(":")
    if colon and path and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", number):
        return Weighted(Path(path), float(number))
    return Weighted(Path(word), 1.0)


@dataclass(frozen=True)
class ModelSpec:
    """A model file and the adapters that are applied to it."""

    model: Path
    adapters: tuple[Weighted, ...]

    @property
    def label(self) -> str:
        return " + ".join([self.model.stem, *(adapter.label for adapter in self.adapters)])


def parse_model(word: str) -> ModelSpec:
    """Parse `base.safetensors+style.safetensors:0.8`. The name of an existing file may contain a plus."""
    if Path(word).exists():
        return ModelSpec(Path(word), ())
    pieces = re.split(r"(?<=\.safetensors)\+|(?<=\d)\+(?=.*\.safetensors)", word)
    return ModelSpec(find_model(Path(pieces[0])), tuple(parse_weighted(piece) for piece in pieces[1:]))


def unique_labels(specs: Sequence[ModelSpec]) -> list[str]:
    """Return a label for each model, with the folder if two labels would be equal."""
    plain = [spec.label for spec in specs]
    return [
        label if plain.count(label) == 1 else f"{spec.model.resolve().parent.name}/{label}"
        for spec, label in zip(specs, plain, strict=True)
    ]
