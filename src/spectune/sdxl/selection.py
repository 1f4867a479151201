"""The layers that words and patterns of a command line name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from spectune.errors import InputError, did_you_mean
from spectune.sdxl.layers import Catalogue, Layer

EVERY, DEFAULT = "all", "default"
_LEAVE_OUT = ("!", "-")
_HINT = (
    "name layers by `default`, `all`, a part (unet, te1, te2), a block (down.1, mid, te1.3), a kind (linear, "
    "conv) or a pattern such as unet.*attn2*"
)
_LEAVES_OUT = "; `!` in front leaves out"


def select_layers(catalogue: Catalogue, patterns: Sequence[str] = ()) -> tuple[Layer, ...]:
    """The layers of a catalogue of all layers that the patterns name, in the catalogue's order.

    Patterns come one by one or separated by commas. Each matches whole names ("unet.*attn2*"), blocks ("mid",
    "te1.3"), parts ("te2") or kinds ("conv"), with * ? [ ] as in file names. With `!` or `-` in front it
    leaves out, whatever the order; where nothing else is named, from the default layers.
    Layers outside the default set, which other trainers do not know, join with `all`, or by a pattern that
    matches no default layer (`embed`, `unet.time_embed.*`).
    Raises InputError for a pattern without a match, and when no layer is left.
    """
    words = [word.strip() for pattern in patterns for word in pattern.split(",") if word.strip()]
    wanted = [word for word in words if not word.startswith(_LEAVE_OUT)] or [DEFAULT]
    unwanted = [word[1:].strip() for word in words if word.startswith(_LEAVE_OUT)]
    chosen = {layer.name for word in wanted for layer in _named(catalogue, word)}
    dropped = {layer.name for word in unwanted for layer in _matches(catalogue, word)}
    left = tuple(layer for layer in catalogue if layer.name in chosen - dropped)
    if not left:
        raise InputError(
            f"`{','.join(words)}` leaves none of {len(catalogue)} layers", hint=_HINT + _LEAVES_OUT
        )
    return left


def layers_named(
    catalogue: Catalogue, words: Sequence[str], *, known: Sequence[str] = ()
) -> tuple[Layer, ...]:
    """Every layer that one of the words names, default or not, in the catalogue's order.

    Raises InputError for a word without a match; `known` are other words that might have been meant.
    """
    chosen = {layer.name for word in words for layer in _matches(catalogue, word.strip(), known)}
    return tuple(layer for layer in catalogue if layer.name in chosen)


def _named(catalogue: Catalogue, word: str) -> list[Layer]:
    """What a word adds: the default layers among its matches, or all of them where there is none."""
    found = _matches(catalogue, word)
    usual = [layer for layer in found if layer.default]
    return found if word == EVERY or not usual else usual


def _matches(catalogue: Catalogue, word: str, known: Sequence[str] = ()) -> list[Layer]:
    if word == EVERY:
        return list(catalogue)
    if word == DEFAULT:
        return [layer for layer in catalogue if layer.default]
    found = [layer for layer in catalogue if any(fnmatchcase(name, word) for name in _names_of(layer))]
    if not found:
        meant = [*known, EVERY, DEFAULT, *dict.fromkeys(_spellings(catalogue))]
        raise InputError(
            f"no layer matches `{word}`{did_you_mean(word, meant)} ({len(catalogue)} layers were looked at)",
            hint=_HINT if known else _HINT + _LEAVES_OUT,
        )
    return found


def _names_of(layer: Layer) -> tuple[str, ...]:
    return layer.part.value, layer.block, layer.kind.value, layer.name


def _spellings(catalogue: Catalogue) -> Iterable[str]:
    """Everything that a word could have meant, short names first."""
    columns = zip(*(_names_of(layer) for layer in catalogue), strict=True)
    return (name for column in columns for name in column)
