"""Select layers of a catalogue by words and patterns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from spectune.errors import InputError, did_you_mean
from spectune.sdxl.layers import Catalogue, Layer

ALL, DEFAULT = "all", "default"
_EXCLUDE = ("!", "-")
_HINT = (
    "select layers by `default`, `all`, a part (unet, te1, te2), a block (down.1, mid, te1.3), a kind "
    "(linear, conv) or a pattern such as unet.*attn2*"
)
_EXCLUDE_HINT = "; a leading `!` excludes"


def select_layers(catalogue: Catalogue, patterns: Sequence[str] = ()) -> tuple[Layer, ...]:
    """Return the layers that the patterns select, in the order of a catalogue of all layers.

    Patterns are separate strings or separated by commas. Each matches complete names ("unet.*attn2*"), blocks
    ("mid", "te1.3"), parts ("te2") or kinds ("conv"), with * ? [ ] as in file names. A pattern with a leading
    `!` or `-` excludes its matches, in any position. If there are only such patterns, they exclude matches
    from the default layers. Layers outside the default set, which other trainers do not know, are selected by
    `all`, or by a pattern that matches no default layer (`embed`, `unet.time_embed.*`).
    Raises InputError for a pattern without a match, and if no layer remains.
    """
    words = [word.strip() for pattern in patterns for word in pattern.split(",") if word.strip()]
    included = [word for word in words if not word.startswith(_EXCLUDE)] or [DEFAULT]
    excluded = [word[1:].strip() for word in words if word.startswith(_EXCLUDE)]
    chosen = {layer.name for word in included for layer in _included(catalogue, word)}
    dropped = {layer.name for word in excluded for layer in _matches(catalogue, word)}
    selected = tuple(layer for layer in catalogue if layer.name in chosen - dropped)
    if not selected:
        raise InputError(
            f"`{','.join(words)}` selects none of {len(catalogue)} layers", hint=_HINT + _EXCLUDE_HINT
        )
    return selected


def layers_named(
    catalogue: Catalogue, words: Sequence[str], *, known: Sequence[str] = ()
) -> tuple[Layer, ...]:
    """Return all layers that match one of the words, default or not, in the order of the catalogue.

    Raises InputError for a word without a match. The message may also suggest a word in `known`.
    """
    chosen = {layer.name for word in words for layer in _matches(catalogue, word.strip(), known)}
    return tuple(layer for layer in catalogue if layer.name in chosen)


def _included(catalogue: Catalogue, word: str) -> list[Layer]:
    """Return the default layers that match a word, or all matches if none of them is a default layer."""
    matches = _matches(catalogue, word)
    default = [layer for layer in matches if layer.default]
    return matches if word == ALL or not default else default


def _matches(catalogue: Catalogue, word: str, known: Sequence[str] = ()) -> list[Layer]:
    if word == ALL:
        return list(catalogue)
    if word == DEFAULT:
        return [layer for layer in catalogue if layer.default]
    matches = [layer for layer in catalogue if any(fnmatchcase(name, word) for name in _names_of(layer))]
    if not matches:
        candidates = [*known, ALL, DEFAULT, *dict.fromkeys(_words(catalogue))]
        raise InputError(
            f"no layer matches `{word}`{did_you_mean(word, candidates)} (out of {len(catalogue)} layers)",
            hint=_HINT if known else _HINT + _EXCLUDE_HINT,
        )
    return matches


def _names_of(layer: Layer) -> tuple[str, ...]:
    return layer.part.value, layer.block, layer.kind.value, layer.name


def _words(catalogue: Catalogue) -> Iterable[str]:
    """Yield all words that match a layer, short ones first."""
    columns = zip(*(_names_of(layer) for layer in catalogue), strict=True)
    return (name for column in columns for name in column)
