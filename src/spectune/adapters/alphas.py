"""Read the alphas of adapters from tensors or PEFT's configuration. The scale of a layer is alpha / rank."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from spectune.adapters.adapter import ALPHA, DOWN, FRAME_DOWN
from spectune.adapters.spellings import is_peft_key, split_adapter_key, stem_and_factor
from spectune.errors import InputError, counted, some_of
from spectune.files.dtypes import SAFETENSORS_NAMES
from spectune.files.provenance import Role, parse_json
from spectune.files.source import WeightSource

KOHYA_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")

PEFT_FILE = "adapter_config.json"
PEFT_METADATA_KEY = "lora_adapter_metadata"  # written by diffusers: {"unet.r": 8, "unet.lora_alpha": 16, ...}
LARGEST_ALPHA = 1e6  # far above any intended scale
LARGEST_NUMBER = 1e30  # a JSON integer may have any number of digits
_ALPHAS = ("lora_alpha", "alpha")  # in PEFT's configurations; the second of LoHa and LoKr
_PEFT_PARTS = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Alpha:
    """The stored alpha of one layer."""

    stem: str
    rank: int
    value: float | None  # None if the file has none, nan if the tensor has several values
    dtype: torch.dtype | None

    @property
    def rounded(self) -> bool:
        """Whether the alpha differs from the rank only because its dtype cannot hold the rank."""
        if self.dtype is None or self.value is None or self.value == self.rank:
            return False
        return self.value == float(torch.tensor(float(self.rank)).to(self.dtype))


def read_alphas(source: WeightSource, *, all_spellings: bool = False) -> Mapping[str, Alpha]:
    """Read the alphas of all pairs with kohya keys, or with keys of any spelling, by stem."""
    alphas: dict[str, Alpha] = {}
    for name, info in source.tensors.items():
        stem, suffix = stem_and_factor(name) if all_spellings else split_adapter_key(name)
        if not (all_spellings or name.startswith(KOHYA_PREFIXES)):
            continue
        if suffix not in (DOWN, FRAME_DOWN) or not info.shape:
            continue
        alpha = source.tensors.get(f"{stem}.{ALPHA}")
        if alpha is None:
            alphas[stem] = Alpha(stem, info.shape[0], None, None)
        else:
            value = float(source.load(alpha.name).item()) if alpha.numel == 1 else math.nan
            alphas[stem] = Alpha(stem, info.shape[0], value, alpha.dtype)
    return alphas


def alpha_problems(source: WeightSource) -> list[str]:
    """Return warnings about the alphas of an adapter.

    In any adapter, warn about an alpha that is missing, not finite, or of a dtype that cannot hold the rank.
    In a principal or tuned adapter of spectune, also warn about an alpha different from the rank.
    """
    ours = source.provenance.role in (Role.PRINCIPAL, Role.TUNED)
    missing: list[str] = []
    broken: list[str] = []
    rounded: list[str] = []
    other: list[str] = []
    for alpha in read_alphas(source).values():
        if alpha.value is None or alpha.dtype is None:
            missing.append(alpha.stem)
        elif not math.isfinite(alpha.value):
            broken.append(alpha.stem)
        elif alpha.rounded:
            rounded.append(
                f"{alpha.stem} {alpha.value:g} for {alpha.rank} in {SAFETENSORS_NAMES[alpha.dtype]}"
            )
        elif ours and alpha.value != alpha.rank:
            other.append(f"{alpha.stem} {alpha.value:g} for {alpha.rank}")
    problems = (
        (missing, "without alpha: programs disagree about the scale"),
        (broken, "with an alpha that is not a finite number"),
        (rounded, "with an alpha whose dtype cannot hold the rank"),
        (other, "with alpha different from the rank"),
    )
    return [f"{counted(len(names), 'layer')} {what}: {some_of(names)}" for names, what in problems if names]


def scale_problems(source: WeightSource) -> list[str]:
    """Return a warning if the layers of an adapter differ in their scale.

    Trainers use one scale from the command line for all layers. diffusers uses the most frequent alpha of a
    part for all its attention layers.
    """
    scales = Counter(
        alpha.value / alpha.rank
        for alpha in read_alphas(source, all_spellings=True).values()
        if alpha.value and alpha.rank
    )
    if len(scales) < 2:
        return []
    shown = ", ".join(f"{scale:g} in {counted(count, 'layer')}" for scale, count in scales.most_common(4))
    return [
        f"alpha / rank differs between layers ({shown}): ComfyUI applies it correctly, but trainers and "
        "diffusers do not; `spectune convert --even-alphas` moves the scale into the factors"
    ]


@dataclass(frozen=True)
class PeftAlphas:
    """The alphas in PEFT's configurations; empty for a file without a configuration."""

    configs: Mapping[str, Mapping[str, Any]]  # by model: unet, text_encoder, text_encoder_2

    def alpha(self, diffusers: str, rank: int) -> float | None:
        """Return the alpha of a layer by its path in a pipeline; None if no configuration covers it.

        PEFT's scale is alpha / rank, or alpha / sqrt(rank) with `use_rslora`.
        """
        root, _, module = diffusers.partition(".")
        config = self.configs.get(root)
        if config is None:
            return None
        patterns = cast(dict[str, float], config.get("alpha_pattern") or {})
        matches = [patterns[key] for key in _pattern_keys(module) if key in patterns]
        # `alpha` in LoHa and LoKr
        configured = matches[0] if matches else config.get("lora_alpha", config.get("alpha"))
        alpha = float(rank if configured is None else configured)
        return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def read_alpha(
    source: WeightSource, key: str | None, peft: PeftAlphas, name: str, rank: int | None, diffusers: str = ""
) -> float | None:
    """Return the alpha of a layer from its tensor or PEFT's configuration; None if neither has one.

    `diffusers` is its path in a pipeline. Raises InputError if alpha is not a number or too large.
    """
    if key is not None:
        alpha, place = float(source.load(key).item()), ""
    else:
        alpha = None if rank is None else peft.alpha(diffusers, rank)
        place = "the configuration of "
    if alpha is not None and not abs(alpha) <= LARGEST_ALPHA:
        raise InputError(
            f"the alpha of {name} in {place}{source.label} is {alpha}: expected a number "
            f"up to {LARGEST_ALPHA:g}"
        )
    return alpha


def missing_alphas(source: WeightSource, names: Sequence[str]) -> tuple[str, ...]:
    """Return a warning about layers without alpha; none for files of PEFT, which writes no usual alpha."""
    if not names or any(map(is_peft_key, source.tensors)):
        return ()
    return (
        f"{counted(len(names), 'layer')} of {source.label} without alpha, read as scale 1: {some_of(names)}",
    )


def read_peft_alphas(path: Path, metadata: Mapping[str, str]) -> PeftAlphas:
    """Read PEFT's configurations from the metadata of an adapter or from `adapter_config.json` next to it.

    Raises InputError for an invalid configuration.
    """
    text = metadata.get(PEFT_METADATA_KEY)
    if text is not None:
        return _split_by_part(_parsed(text, f"metadata {PEFT_METADATA_KEY} of {path.name}"))
    config_path = path.with_name(PEFT_FILE)
    if path.name == "adapter_model.safetensors" and config_path.is_file():
        # the file belongs to one model, but does not say to which
        config = _parsed(config_path.read_text(encoding="utf-8", errors="replace"), str(config_path))
        return PeftAlphas(dict.fromkeys(_PEFT_PARTS, config))
    return PeftAlphas({})


def _parsed(text: str, where: str) -> dict[str, Any]:
    config = parse_json(text)
    if not isinstance(config, dict):
        raise InputError(f"{where} is not a JSON object: {text[:60]}")
    settings = cast(dict[str, Any], config)
    for key, value in settings.items():
        if value is not None and key.rpartition(".")[2] in _ALPHAS and not _is_number(value):
            raise InputError(f"{where}: {key} is {value!r}: expected a number")
        if value is not None and key.endswith("alpha_pattern") and not _are_numbers(value):
            raise InputError(f"{where}: {key} is {value!r}: expected numbers by layer name")
    return settings


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < LARGEST_NUMBER


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_number, cast(dict[str, object], value).values()))


def _split_by_part(flat: Mapping[str, Any]) -> PeftAlphas:
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        part, _, name = key.partition(".")
        if part in _PEFT_PARTS:
            configs.setdefault(part, {})[name] = value
    return PeftAlphas(configs)


def _pattern_keys(module: str) -> Iterator[str]:
    """Yield the keys of alpha_pattern that match a module: its path, with or without `^`, and each suffix.

    PEFT treats the keys as regular expressions. Here they are plain names, because files are not trusted.
    """
    yield f"^{module}"
    while module:
        yield module
        module = module.partition(".")[2]
