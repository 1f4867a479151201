"""Adapters that are more than a product of two factors per layer: copied as they are, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from spectune.adapters.adapter import REPLACED, AnyAdapter
from spectune.adapters.reader import is_general, open_any_adapter
from spectune.adapters.writer import check_adapter_name
from spectune.checkpoints.open import open_checkpoint
from spectune.core.linalg import norm
from spectune.errors import InputError
from spectune.files.reader import Checkpoint
from spectune.files.source import RenamedFiles, RenamedTensor, WeightSource
from spectune.files.writer import StreamWriter
from spectune.operation import Progress
from spectune.ops.shared import STALE, write_all
from spectune.pairs.merged import Merged, merged
from spectune.sdxl.layers import build_catalogue


def is_other_kind(path: Path, without: Collection[str] = ()) -> bool:
    """Return whether a file, without some of its keys, has more than a product of two factors per layer."""
    with open_checkpoint(path) as source:
        return is_general(key for key in source.tensors if key not in without)


def has_whole_tensors(path: Path) -> bool:
    """Return whether a file holds complete tensors that replace those of its base."""
    with open_checkpoint(path) as source:
        return any(key.startswith(REPLACED) for key in source.tensors)


def check_no_options(options: object, defaults: object, names: Sequence[str], label: str) -> None:
    """Raise InputError for options that need factors, because the tensors are copied."""
    extra = [f"`{name}`" for name in names if getattr(options, name) != getattr(defaults, name)]
    if extra:
        raise InputError(
            f"{label} is more than a product of two factors per layer: its tensors are copied, so "
            f"{', '.join(extra)} cannot apply",
            hint=f"`spectune export MODEL {label}` writes it as a plain LoRA, with `keys` and `dtype`",
        )


def copy_tensors(
    out: Path,
    places: Mapping[str, WeightSource],
    metadata: Mapping[str, str],
    *,
    force: bool,
    progress: Progress | None,
) -> str:
    """Copy tensors, each from its file, into an adapter file, and return the weights hash."""
    check_adapter_name(out)
    entries = {
        key: RenamedTensor(source.tensors[key], partial(source.load, key)) for key, source in places.items()
    }
    kept = {key: text for key, text in metadata.items() if key not in STALE}
    copied = Checkpoint(out, [RenamedFiles(entries, [])], kept)
    infos = list(copied.tensors.values())
    with StreamWriter(out, infos, metadata=kept, force=force) as writer:
        write_all(copied, writer, progress)
    return writer.hash


def difference_of_drop(path: Path, base: Path, dropped: Sequence[str], essential: Sequence[str]) -> float:
    """Return how much the change of a base differs if the `essential` keys of an adapter are dropped.

    The difference is relative to the change with these keys, in Frobenius norms. The other `dropped` keys are
    left out of both.
    """
    others = [key for key in dropped if key not in essential]
    with open_checkpoint(base) as source:
        catalogue = build_catalogue(source, all_layers=True)
        with (
            open_any_adapter(path, catalogue, without=others) as before,
            open_any_adapter(path, catalogue, without=dropped) as after,
        ):
            return _relative_distance(source, before, after)


def _relative_distance(base: WeightSource, one: AnyAdapter, other: AnyAdapter) -> float:
    """Return |change of `one` - change of `other`| / |change of `one`| over all tensors of the base.

    Raises InputError or PairingError if an adapter cannot be applied to the base.
    """
    models = [merged(base, [(adapter, 1.0)], dtype=torch.float32) for adapter in (one, other)]
    changed = {name for model in models if isinstance(model, Merged) for name in model.touched}
    between = size = 0.0
    for name in sorted(changed):
        before = base.load(name).float()
        first, second = (model.load(name).float() for model in models)
        between += norm(first - second) ** 2
        size += norm(first - before) ** 2
    return math.sqrt(between / size) if size else 0.0
