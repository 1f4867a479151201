"""Words of the command line as values; every wrong word is an InputError with the words that are known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from spectune.errors import InputError


def parse_device(word: str) -> str:
    """`cpu`, `cuda` or `cuda:1`; auto is the GPU where there is one. InputError for one that is not there."""
    if word == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?|mps", word)
    if match is None:
        raise InputError(f"unknown device {word!r}", hint="auto, cpu, cuda or cuda:1")
    count = torch.cuda.device_count()
    if word.startswith("cuda") and int(match[1] or 0) >= count:
        raise InputError(f"there is no {word}: torch sees {count} CUDA devices", hint="--device cpu works")
    if word == "mps" and not torch.backends.mps.is_available():
        raise InputError("there is no mps device", hint="--device cpu works")
    return word


@dataclass(frozen=True)
class ImageSize:
    """Picture size in pixels."""

    width: int
    height: int


def parse_size(word: str) -> ImageSize:
    """`1024` or `1216x832` (width x height)."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", word.strip().lower())
    if match is None:
        raise InputError(f"unreadable size {word!r}", hint="write it like 1024 or 1216x832, in pixels")
    width = int(match[1])
    return ImageSize(width=width, height=int(match[2] or width))


@dataclass(frozen=True)
class Weighted:
    """An adapter file and how strongly it counts."""

    path: Path
    strength: float

    @property
    def label(self) -> str:
        return self.path.stem if self.strength == 1.0 else f"{self.path.stem}:{self.strength:g}"


def parse_weighted(word: str) -> Weighted:
    """`style.safetensors` or `style.safetensors:0.8`; a drive letter's colon is no strength."""
    path, colon, number = word.rpartition(":")
    if colon and path and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", number):
        return Weighted(Path(path), float(number))
    return Weighted(Path(word), 1.0)


@dataclass(frozen=True)
class ModelSpec:
    """A model with the adapters on top of it."""

    model: Path
    adapters: tuple[Weighted, ...]

    @property
    def label(self) -> str:
        return " + ".join([self.model.stem, *(adapter.label for adapter in self.adapters)])


def parse_model(word: str) -> ModelSpec:
    """`base.safetensors` or `base.safetensors+style.safetensors:0.8`; a plus in a file's own name is fine."""
    if Path(word).exists():
        return ModelSpec(Path(word), ())
    pieces = re.split(r"(?<=\.safetensors)\+|(?<=\d)\+(?=.*\.safetensors)", word)
    return ModelSpec(Path(pieces[0]), tuple(parse_weighted(piece) for piece in pieces[1:]))


def unique_labels(specs: Sequence[ModelSpec]) -> list[str]:
    """A name for each model; where two files are called the same, their folder tells them apart."""
    plain = [spec.label for spec in specs]
    return [
        label if plain.count(label) == 1 else f"{spec.model.resolve().parent.name}/{label}"
        for spec, label in zip(specs, plain, strict=True)
    ]


def check_sheet_name(path: Path) -> None:
    """Raise InputError, before anything is drawn, for a sheet that would not be a picture file."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"{path} has no picture's ending", hint="name it like sheet.png")


def read_captions(captions: list[str], file: Path | None) -> list[str]:
    """Captions given one by one and those of a text file, one a line; raises InputError without any."""
    lines: list[str] = []
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read captions from {file}: {error}") from error
    everything = captions + [line.strip() for line in lines if line.strip()]
    if not everything:
        raise InputError("no captions", hint='pass --caption "a cat" (several times) or --captions FILE')
    return everything
