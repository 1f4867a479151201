"""The alphas of an adapter beside its ranks: the scale of a layer is alpha / rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, nan

import torch

from spectune.adapters.adapter import ALPHA, DOWN, FRAME_DOWN
from spectune.adapters.spellings import split_adapter_key, stem_and_factor
from spectune.errors import some_of
from spectune.files.dtypes import SAFETENSORS_NAMES
from spectune.files.provenance import Role
from spectune.files.source import WeightSource

KOHYA_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")


@dataclass(frozen=True)
class Alpha:
    """The scale of one layer of an adapter, as its file has it."""

    stem: str
    rank: int
    value: float | None  # None where the file has none, nan where it is not one number
    dtype: torch.dtype | None

    @property
    def rounded(self) -> bool:
        """Whether it is the rank as far as its type can hold it, and not the rank."""
        if self.dtype is None or self.value is None or self.value == self.rank:
            return False
        return self.value == float(torch.tensor(float(self.rank)).to(self.dtype))


def alpha_problems(source: WeightSource) -> list[str]:
    """What is wrong with the alphas of an adapter, in words; principals of spectune have alpha = rank.

    A missing alpha, one that is not a finite number, and one whose type cannot hold the rank are problems of
    any adapter; another value than the rank is one of a principal that spectune wrote.
    """
    ours = source.provenance.role in (Role.PRINCIPAL, Role.TUNED)
    missing: list[str] = []
    broken: list[str] = []
    rounded: list[str] = []
    other: list[str] = []
    for alpha in read_alphas(source).values():
        if alpha.value is None or alpha.dtype is None:
            missing.append(alpha.stem)
        elif not isfinite(alpha.value):
            broken.append(alpha.stem)
        elif alpha.rounded:
            rounded.append(
                f"{alpha.stem} {alpha.value:g} for {alpha.rank} in {SAFETENSORS_NAMES[alpha.dtype]}"
            )
        elif ours and alpha.value != alpha.rank:
            other.append(f"{alpha.stem} {alpha.value:g} for {alpha.rank}")
    found = (
        (missing, "layers have no alpha: programs disagree about the scale"),
        (broken, "layers have an alpha that is not a number"),
        (rounded, "layers have an alpha whose type cannot hold their rank"),
        (other, "layers have an alpha that is not their rank"),
    )
    return [f"{len(names)} {what}: {some_of(names)}" for names, what in found if names]


def scale_problems(source: WeightSource) -> list[str]:
    """What is to be said where the layers of an adapter do not all have one scale.

    Trainers take one scale for all from the command line, and diffusers gives attention layers the alpha
    that most of their part have.
    """
    scales = Counter(
        alpha.value / alpha.rank
        for alpha in read_alphas(source, all_spellings=True).values()
        if alpha.value and alpha.rank
    )
    if len(scales) < 2:
        return []
    told = ", ".join(f"{scale:g} in {count} layers" for scale, count in scales.most_common(4))
    return [
        f"alpha / rank is not the same everywhere ({told}): ComfyUI reads it right, trainers and diffusers "
        "do not; `spectune convert --even-alphas` puts the scale into the factors"
    ]


def read_alphas(source: WeightSource, *, all_spellings: bool = False) -> Mapping[str, Alpha]:
    """The alphas of all pairs in kohya keys, or in keys of any spelling, by stem."""
    found: dict[str, Alpha] = {}
    for name, info in source.tensors.items():
        stem, suffix = stem_and_factor(name) if all_spellings else split_adapter_key(name)
        if not (all_spellings or name.startswith(KOHYA_PREFIXES)):
            continue
        if suffix not in (DOWN, FRAME_DOWN) or not info.shape:
            continue
        alpha = source.tensors.get(f"{stem}.{ALPHA}")
        if alpha is None:
            found[stem] = Alpha(stem, info.shape[0], None, None)
        else:
            value = float(source.load(alpha.name).item()) if alpha.numel == 1 else nan
            found[stem] = Alpha(stem, info.shape[0], value, alpha.dtype)
    return found
