"""Count the layers of adapters that are more than a product of two factors per layer, from the header."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from spectune.adapters.adapter import ALPHA, DOWN
from spectune.adapters.kinds.table import DIFFERENCES, MAGNITUDES, SHARED, kinds_with
from spectune.adapters.spellings import adapter_part, stem_and_suffix
from spectune.files.source import WeightSource

_DIFFERENCES = "differences of biases, norms or embeddings"


@dataclass(frozen=True)
class KindCounts:
    """The layers of an adapter file, by what they are."""

    kinds: Mapping[str, int]  # "LoHa", "DoRA of LoRA" -> layers
    parts: Mapping[str, int]  # unet, te1, te2 -> layers
    ranks: Mapping[int, int]  # rank -> layers of kinds that have one
    keys: tuple[str, ...]  # of the tensors that change the model
    ignored: tuple[str, ...]  # other keys


def count_kinds(source: WeightSource) -> KindCounts:
    """Group the keys of a file by layer and recognize the kind of each.

    The shapes of a model decide between kinds with the same keys: they are named together.
    """
    layers: dict[str, dict[str, str]] = {}
    ignored: list[str] = []
    for key in source.tensors:
        stem, suffix = stem_and_suffix(key)
        if suffix is None or _part_of(stem) is None:
            ignored.append(key)
        else:
            layers.setdefault(stem, {})[suffix] = key
    ranks: Counter[int] = Counter()
    kinds: Counter[str] = Counter()
    for keys in layers.values():
        found = kinds_with(frozenset(keys) - SHARED)
        magnitude = "DoRA of " if any(name in keys for name in MAGNITUDES) else ""
        names = " or ".join(kind.name for kind in found)
        other = _DIFFERENCES if keys.keys() <= DIFFERENCES.keys() else "incomplete"
        kinds[f"{magnitude}{names}" if found else other] += 1
        if found:
            rank = found[0].rank({suffix: source.tensors[key].shape for suffix, key in keys.items()})
            ranks.update([] if rank is None else [rank])
    parts = Counter(_part_of(stem) or "other" for stem in layers)
    known = (key for keys in layers.values() for suffix, key in keys.items() if suffix != ALPHA)
    return KindCounts(kinds, parts, dict(sorted(ranks.items())), tuple(known), tuple(ignored))


def _part_of(stem: str) -> str | None:
    return adapter_part(f"{stem}.{DOWN}")
