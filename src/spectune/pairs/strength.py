"""Strengths of adapters, one per part, and weights of checkpoints, one per part, block or pattern."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase

from spectune.errors import InputError, did_you_mean

_BOTH_ENCODERS = "te"
_PARTS = ("unet", "te1", "te2", "vae")


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


def _number(text: str, word: str, kind: str = "strength") -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"unreadable {kind} {word!r}", hint="write it like 0.8 or unet=0.8,te=0.5") from None


@dataclass(frozen=True)
class ModelWeights:
    """The weights of a checkpoint in a sum; a narrower word overrides a wider one, a later an earlier one."""

    everywhere: float = 0.0
    by_word: Mapping[str, float] = field(default_factory=dict[str, float])  # part, block or pattern -> weight

    def of(self, names: tuple[str, ...]) -> float:
        """Return the weight of a module with these names: its part, its block, its own name."""
        weight = self.everywhere
        for word, value in sorted(self.by_word.items(), key=lambda item: _breadth(item[0])):
            if any(fnmatchcase(name, word) for name in names):
                weight = value
        return weight

    def __str__(self) -> str:
        words = [f"{word}={value:g}" for word, value in self.by_word.items()]
        return ",".join(words if words and not self.everywhere else [f"{self.everywhere:g}", *words])


def _breadth(word: str) -> int:
    return 0 if word == _BOTH_ENCODERS else 1 if word in _PARTS else 2


def parse_weights(text: str) -> ModelWeights:
    """Parse `0.3`, `unet=0.3,te=0,down.1=0.5` or `0.3,vae=0`; a number without a word is for all others.

    Without such a number, tensors that no word names have weight 0.
    """
    everywhere, by_word = 0.0, dict[str, float]()
    for index, piece in enumerate(text.split(",")):
        word, equals, number = (part.strip() for part in piece.rpartition("="))
        if (not equals and index) or (equals and not word) or word in by_word:
            problem = f"{word} appears twice" if word in by_word else f"cannot parse {piece!r}"
            raise InputError(
                f"{problem} in the weights {text!r}",
                hint="write them like 0.5 or unet=0.3,te=0,down.1=0.5",
            )
        value = _finite(number, text)
        if equals:
            by_word[word] = value
        else:
            everywhere = value
    return ModelWeights(everywhere, by_word)


def _finite(number: str, text: str) -> float:
    value = _number(number, text, "weight")
    if not math.isfinite(value):
        raise InputError(f"the weight in {text!r} is {value}: expected a finite number")
    return value
