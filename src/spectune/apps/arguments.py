"""Words of the command line as values; every wrong word is an InputError with the words that are known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from spectune.errors import InputError, did_you_mean

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_SHORT = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}


def parse_dtype(word: str) -> torch.dtype:
    """A storage type by its long or short name (float16 = fp16)."""
    name = _SHORT.get(word.lower(), word.lower())
    if name not in DTYPES:
        raise InputError(
            f"unknown type {word!r}{did_you_mean(name, DTYPES)}", hint=f"one of {', '.join(DTYPES)}"
        )
    return DTYPES[name]


@dataclass(frozen=True)
class Size:
    """Picture size in pixels."""

    width: int
    height: int


def parse_size(word: str) -> Size:
    """`1024` or `1216x832` (width x height)."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", word.strip().lower())
    if match is None:
        raise InputError(f"unreadable size {word!r}", hint="write it like 1024 or 1216x832, in pixels")
    width = int(match[1])
    return Size(width=width, height=int(match[2] or width))


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
