"""Traits: named groups of layers of an adapter, for slices. The term is from B-LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from spectune.adapters.adapter import DOWN, UP
from spectune.errors import InputError, did_you_mean
from spectune.files.text import load_json
from spectune.sdxl.layers import Catalogue, Layer
from spectune.sdxl.selection import layers_named

# The attention layers of these two transformers determine content and style: B-LoRA, Frenkel et al. 2024,
# arXiv 2403.14572.
_ATTENTION_OF: Mapping[str, str] = {
    "content": "unet.up_blocks.0.attentions.0.",
    "style": "unet.up_blocks.0.attentions.1.",
}
_PARTS_OF: Mapping[str, tuple[str, ...]] = {
    "te": ("te1", "te2"),
    "te1": ("te1",),
    "te2": ("te2",),
    "unet": ("unet",),
}
TRAITS = (*_PARTS_OF, *_ATTENTION_OF)
_LISTS = ("whitelist", "blacklist")
_FORM = 'write {"te": {"whitelist": ["lora_te1_", "lora_te2_"], "blacklist": []}}'


@dataclass(frozen=True)
class TraitRule:
    """A rule that selects layers whose kohya keys contain a whitelisted word and no blacklisted one."""

    whitelist: tuple[str, ...]
    blacklist: tuple[str, ...]

    def holds(self, key: str) -> bool:
        return any(word in key for word in self.whitelist) and not any(word in key for word in self.blacklist)


def read_traits(path: Path) -> dict[str, TraitRule]:
    """Read traits from a JSON file: {"te": {"whitelist": ["lora_te1_", "lora_te2_"], "blacklist": []}}.

    Raises InputError for a file with another structure.
    """
    try:
        content = load_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read traits from {path}: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object", hint=_FORM)
    return {name: _rule(name, rule, path) for name, rule in cast(dict[str, object], content).items()}


def _rule(name: str, rule: object, path: Path) -> TraitRule:
    if not isinstance(rule, dict):
        raise InputError(f"trait `{name}` of {path} is not an object", hint=_FORM)
    lists = cast(dict[str, object], rule)
    for key, words in lists.items():
        if key not in _LISTS:
            raise InputError(
                f"trait `{name}` of {path} has an unknown key `{key}`{did_you_mean(key, _LISTS)}",
                hint=_FORM,
            )
        if not isinstance(words, list) or not all(
            isinstance(word, str) for word in cast(list[object], words)
        ):
            raise InputError(f"{key} of trait `{name}` of {path} is not a list of words", hint=_FORM)
    white, black = (tuple(cast(list[str], lists.get(key, []))) for key in _LISTS)
    if not white:
        raise InputError(
            f"trait `{name}` of {path} has an empty whitelist: expected at least one word", hint=_FORM
        )
    return TraitRule(white, black)


def trait_layers(
    catalogue: Catalogue, trait: str | None, rules: Mapping[str, TraitRule]
) -> tuple[Layer, ...]:
    """Return the layers of a catalogue that a trait selects, in their order; None selects all.

    A trait is a name from `rules`, one of TRAITS, or a block or pattern of `layers_named`; `+` joins several.
    Raises InputError for a word without a match.
    """
    if trait is None:
        return catalogue.layers
    words = [trait] if trait in rules else [word.strip() for word in trait.split("+")]
    chosen = {layer.name for word in words for layer in _one_trait(catalogue, word, rules)}
    return tuple(layer for layer in catalogue if layer.name in chosen)


def _one_trait(catalogue: Catalogue, trait: str, rules: Mapping[str, TraitRule]) -> tuple[Layer, ...]:
    if trait in rules:
        return _by_keys(catalogue, trait, rules[trait])
    if trait in _ATTENTION_OF:
        root = _ATTENTION_OF[trait]
        layers = [layer for layer in catalogue if layer.diffusers.startswith(root) and ".attn" in layer.name]
        return _some(layers, catalogue, trait)
    if trait in _PARTS_OF:
        parts = _PARTS_OF[trait]
        return _some([layer for layer in catalogue if layer.part.value in parts], catalogue, trait)
    return layers_named(catalogue, [trait], known=(*TRAITS, *rules))


def _by_keys(catalogue: Catalogue, trait: str, rule: TraitRule) -> tuple[Layer, ...]:
    """Return the layers whose two factors match a rule; the keys of alphas are not compared."""
    chosen: list[Layer] = []
    for layer in catalogue:
        matches = {rule.holds(f"{layer.kohya}.{suffix}") for suffix in (DOWN, UP)}
        if len(matches) > 1:
            raise InputError(
                f"trait `{trait}` selects one factor of {layer.kohya} without the other",
                hint="use words that match complete layers, not lora_up or lora_down",
            )
        if matches.pop():
            chosen.append(layer)
    return _some(chosen, catalogue, trait)


def _some(layers: Sequence[Layer], catalogue: Catalogue, trait: str) -> tuple[Layer, ...]:
    if not layers:
        raise InputError(
            f"trait `{trait}` selects none of {len(catalogue)} layers",
            hint="use a trait of layers that the file has",
        )
    return tuple(layers)
