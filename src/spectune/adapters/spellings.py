"""Map the adapter keys of other programs to layers and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from spectune.adapters.adapter import (
    DELTA_DOWN,
    DELTA_UP,
    DOWN,
    FRAME_DOWN,
    FRAME_UP,
    LOW_RANK_SUFFIXES,
    MID,
    REPLACED,
    UP,
)
from spectune.adapters.kinds.dora import PEFT_MAGNITUDE
from spectune.adapters.kinds.table import DIFFERENCES, OTHER_SUFFIXES
from spectune.errors import InputError, did_you_mean
from spectune.sdxl.names import COMFYUI_PARTS, comfyui_name, kohya_stem


class Spelling(StrEnum):
    """The spellings of keys that spectune writes."""

    KOHYA = "kohya"  # lora_unet_input_blocks_4_1_proj_in.lora_down.weight: all programs read it
    DIFFUSERS = "diffusers"  # unet.down_blocks.1.attentions.0.proj_in.lora_A.weight: also used by PEFT
    COMFYUI = "comfyui"  # diffusion_model.input_blocks.4.1.proj_in.lora_down.weight


def parse_spelling(word: str) -> Spelling:
    """Return a spelling by name; `peft` means diffusers."""
    known = [spelling.value for spelling in Spelling]
    name = "diffusers" if word.lower() == "peft" else word.lower()
    if name not in known:
        raise InputError(
            f"unknown spelling {word!r}{did_you_mean(name, known)}",
            hint=f"expected one of {', '.join(known)}",
        )
    return Spelling(name)


COMFYUI_ROOTS = tuple(f"{root}." for root in COMFYUI_PARTS.values())
_PEFT_SUFFIXES: Mapping[str, str] = {DOWN: "lora_A.weight", UP: "lora_B.weight"}

# All spellings of suffixes, and the kohya suffix of each. PEFT can add the name of the adapter ("default");
# the last four are from diffusers before it used PEFT.
_SUFFIXES: Mapping[str, str] = {
    **{suffix: suffix for suffix in (*LOW_RANK_SUFFIXES, MID, FRAME_DOWN, FRAME_UP, DELTA_DOWN, DELTA_UP)},
    "lora_A.weight": DOWN,
    "lora_B.weight": UP,
    "lora_A.default.weight": DOWN,
    "lora_B.default.weight": UP,
    "lora.down.weight": DOWN,
    "lora.up.weight": UP,
    "lora_linear_layer.down.weight": DOWN,
    "lora_linear_layer.up.weight": UP,
}
# The same for suffixes of other kinds of adapters. A path that ends in `weight` is a parameter of a model.
_OTHER: Mapping[str, str] = {
    **{suffix: suffix for suffix in OTHER_SUFFIXES},
    "magnitude": PEFT_MAGNITUDE,  # ai-toolkit
    "lora_magnitude_vector.weight": PEFT_MAGNITUDE,
    "lora_magnitude_vector.default": PEFT_MAGNITUDE,
    "lora_magnitude_vector.default.weight": PEFT_MAGNITUDE,
}
_IN_PATHS: Mapping[str, str] = {ending: suffix for ending, suffix in _OTHER.items() if ending != "weight"}
# Beginnings of keys whose stem has no dots. LyCORIS's own wrapper writes `lycoris_`, sd-scripts's OFT
# `oft_unet_`.
FLAT_ROOTS = ("lora_", "lycoris_", "oft_unet_")
EMBEDDINGS = "bundle_emb."  # embedded textual inversions: OneTrainer, Forge, ComfyUI nodes
_ROOTS: Mapping[str, str] = {
    "lora_unet_": "unet",
    "oft_unet_": "unet",
    "lycoris_": "unet",
    "lora_te1_": "te1",
    "lora_te2_": "te2",
    "unet.": "unet",
    "text_encoder.": "te1",
    "text_encoder_2.": "te2",
    **{f"{root}.": part for part, root in COMFYUI_PARTS.items()},
}
PEFT_ROOT = "base_model.model."  # in a file that PEFT saved for a single model
_UNET_ROOTS = (
    "conv_in.",
    "time_embedding.",
    "add_embedding.",
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "conv_out.",
)
# unet...attn1.processor.to_out_lora.down.weight: diffusers in 2023
_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight$")


def spelled(layer_name: str, diffusers: str, spelling: Spelling) -> str:
    """Return the stem of a layer's keys (all before the suffix); `diffusers` is its path in a pipeline."""
    if spelling is Spelling.KOHYA:
        return kohya_stem(layer_name)
    if spelling is Spelling.DIFFUSERS:
        return diffusers
    return comfyui_name(layer_name)


def spelled_suffix(suffix: str, spelling: Spelling) -> str:
    """Return the suffix of a factor in a spelling; spellings that have an alpha all call it `alpha`."""
    return _PEFT_SUFFIXES.get(suffix, suffix) if spelling is Spelling.DIFFUSERS else suffix


def stems(layer_name: str, diffusers: str) -> Iterator[str]:
    """Yield every stem that a layer can have in a file."""
    for spelling in Spelling:
        yield spelled(layer_name, diffusers, spelling)
    flat = kohya_stem(layer_name).removeprefix("lora_")
    yield f"lycoris_{flat}"
    if layer_name.startswith("unet."):
        yield f"oft_{flat}"
        # trainers that use the diffusers UNet join its names with underscores, like kohya
        joined = kohya_stem(diffusers)
        yield joined
        # LyCORIS's wrapper, of a pipeline or of the UNet alone (SimpleTuner)
        yield joined.replace("lora_", "lycoris_", 1)
        yield joined.replace("lora_unet_", "lycoris_", 1)
    else:
        # transformers 5 names the encoders in memory without the prefix
        yield diffusers.replace(".text_model.", ".", 1)


@dataclass(frozen=True)
class KeyTable:
    """The keys of a file, grouped by layer."""

    keys: Mapping[str, Mapping[str, str]]  # layer or other module -> suffix in kohya's spelling -> key
    foreign: tuple[str, ...]  # stems that match no layer of the model
    unexpected: tuple[str, ...]  # keys of layers with unknown suffixes
    duplicates: tuple[tuple[str, str], ...]  # pairs of keys of the same factor
    replaced: tuple[str, ...] = ()  # names in the base of the tensors that the file replaces
    # the same for norms, embeddings and the text projection
    others: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    embeddings: tuple[str, ...] = ()  # names of embedded textual inversions, which are not read

    @property
    def tuned(self) -> bool:
        """Whether the file holds trained deltas."""
        whole = bool(self.replaced) and not self.keys
        return whole or any(FRAME_DOWN in suffixes for suffixes in self.keys.values())

    @property
    def general(self) -> bool:
        """Whether the file holds more than products of two factors."""
        return bool(self.others) or any(OTHER_SUFFIXES & suffixes.keys() for suffixes in self.keys.values())


def sort_keys(
    names: Iterable[str], layers: Mapping[str, str], others: Mapping[str, str] | None = None
) -> KeyTable:
    """Group the keys of a file by layer.

    `layers` maps layer names to paths in a pipeline, `others` the names of norms, embeddings and the text
    projection, for which a file can only hold differences and pairs.
    """
    known = {stem: name for name, diffusers in layers.items() for stem in stems(name, diffusers)}
    other = {stem: name for name, path in (others or {}).items() for stem in stems(name, path)}
    differences: dict[str, dict[str, str]] = {}
    embeddings: dict[str, None] = {}
    keys: dict[str, dict[str, str]] = {}
    foreign: dict[str, None] = {}
    unexpected: list[str] = []
    duplicates: list[tuple[str, str]] = []
    replaced: list[str] = []
    for key in names:
        if key.startswith(REPLACED):
            replaced.append(key.removeprefix(REPLACED))
            continue
        if key.startswith(EMBEDDINGS):
            embeddings[key.removeprefix(EMBEDDINGS).rpartition(".")[0]] = None
            continue
        stem, suffix = stem_and_suffix(key)
        if stem in known:
            found = keys.setdefault(known[stem], {}) if suffix else {}
        elif stem in other and (suffix in DIFFERENCES or suffix in LOW_RANK_SUFFIXES):
            found = differences.setdefault(other[stem], {})
        else:
            foreign[stem] = None
            continue
        if suffix is None:
            unexpected.append(key)
        elif suffix in found:
            duplicates.append((found[suffix], key))
        else:
            found[suffix] = key
    return KeyTable(
        keys,
        tuple(foreign),
        tuple(unexpected),
        tuple(duplicates),
        tuple(replaced),
        differences,
        tuple(embeddings),
    )


def factor_of(key: str) -> str | None:
    """Return the suffix of a key in kohya's spelling; None if the key is not a factor or alpha."""
    return stem_and_factor(key)[1]


def adapter_part(key: str) -> str | None:
    """Return unet, te1 or te2 for an adapter key in any spelling; None for any other key."""
    stem, suffix = stem_and_factor(key)
    if suffix is None:
        return None
    return next((part for root, part in _ROOTS.items() if stem.startswith(root)), None)


def spelling_of(key: str) -> str:
    """Return the name of the spelling of a key."""
    if key.startswith(FLAT_ROOTS):
        return Spelling.KOHYA.value
    return (Spelling.COMFYUI if key.startswith(COMFYUI_ROOTS) else Spelling.DIFFUSERS).value


def split_adapter_key(key: str) -> tuple[str, str]:
    """Return stem and suffix of a kohya key: `lora_te1_..._fc1` and `lora_down.weight`."""
    stem, _, suffix = key.partition(".")
    return stem, suffix


def is_peft_key(key: str) -> bool:
    """Return whether an adapter key has the spelling of PEFT or diffusers."""
    return any(sign in key for sign in (".lora_A.", ".lora_B.", ".lora.down.", ".lora.up."))


def stem_and_factor(key: str) -> tuple[str, str | None]:
    """Return the stem of a key and its suffix in kohya's spelling (None if the key is not a factor)."""
    stem, suffix = stem_and_suffix(key)
    return stem, None if suffix in OTHER_SUFFIXES else suffix


def stem_and_suffix(key: str) -> tuple[str, str | None]:
    """Return the stem of a key and its suffix in kohya's spelling (None if the suffix is not known)."""
    key = _PROCESSOR.sub(_old_attention, key)
    if key.startswith(FLAT_ROOTS):
        stem, suffix = split_adapter_key(key)
        return stem, _SUFFIXES.get(suffix, _OTHER.get(suffix))
    key = key.replace(PEFT_ROOT, "", 1)  # at the beginning, or after `unet.`
    if key.startswith(_UNET_ROOTS):
        key = f"unet.{key}"
    for endings in (_SUFFIXES, _IN_PATHS):
        for ending, suffix in endings.items():
            if key.endswith(f".{ending}"):
                return key.removesuffix(f".{ending}"), suffix
    return key.removesuffix(".weight").rpartition(".")[0], None


def _old_attention(match: re.Match[str]) -> str:
    axis = "to_out.0" if match[1] == "out" else f"to_{match[1]}"
    return f".{axis}.lora.{match[2]}.weight"
