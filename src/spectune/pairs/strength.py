"""Strengths: the factors that multiply the change of an adapter, one per part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from spectune.errors import InputError, did_you_mean

_BOTH_ENCODERS = "te"


@dataclass(frozen=True)
class Strength:
    """The factor on the change of an adapter in each part; 1 applies the change as trained."""

    unet: float = 1.0
    te1: float = 1.0
    te2: float = 1.0

    def __post_init__(self) -> None:
        for part, value in self.by_part.items():
            if not math.isfinite(value):
                raise InputError(f"the strength of {part} is {value}: expected a finite number")

    @classmethod
    def everywhere(cls, value: float) -> Strength:
        return cls(value, value, value)

    @property
    def by_part(self) -> Mapping[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def is_one(self) -> bool:
        """Whether all factors are 1."""
        return self == Strength()

    def of(self, layer_name: str) -> float:
        """Return the strength for a layer by its canonical name."""
        return self.by_part[layer_name.partition(".")[0]]

    def __str__(self) -> str:
        if len(set(self.by_part.values())) == 1:
            return f"{self.unet:g}"
        return ",".join(f"{part}={value:g}" for part, value in self.by_part.items())


def parse_strength(word: str) -> Strength:
    """Parse `0.8`, or strengths by part such as `unet=0.8,te=0`; `te1` or `te2` overrides `te`.

    Parts without a value have strength 1.
    """
    if "=" not in word:
        return Strength.everywhere(_number(word, word))
    values: dict[str, float] = {}
    for piece in word.split(","):
        part, number = _pair(piece, word)
        if part in values:
            raise InputError(f"{part} appears twice in {word!r}", hint="give each part one strength")
        values[part] = number
    return strength_of(values)


def strength_of(strength: float | Mapping[str, float] | Strength) -> Strength:
    """Return the Strength for one number or numbers by part; raise InputError for an unknown part."""
    if isinstance(strength, Strength):
        return strength
    if not isinstance(strength, Mapping):
        return Strength.everywhere(float(strength))
    known = (*(field.name for field in fields(Strength)), _BOTH_ENCODERS)
    values: dict[str, float] = {}
    # `te` first, so that a value for one encoder overrides it
    for part, value in sorted(strength.items(), key=lambda item: item[0] != _BOTH_ENCODERS):
        if part not in known:
            raise InputError(
                f"unknown part {part!r}{did_you_mean(part, known)}",
                hint=f"expected one of {', '.join(known)}",
            )
        for name in ("te1", "te2") if part == _BOTH_ENCODERS else (part,):
            values[name] = float(value)
    return Strength(**values)


def _pair(piece: str, word: str) -> tuple[str, float]:
    part, _, number = piece.partition("=")
    return part.strip(), _number(number, word)


def _number(text: str, word: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(
            f"unreadable strength {word!r}", hint="write it like 0.8 or unet=0.8,te=0.5"
        ) from None
