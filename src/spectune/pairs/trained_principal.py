"""Compute deltas from a principal that another program trained, and the principal it started from."""

from __future__ import annotations

from dataclasses import replace

import torch

from spectune.adapters.adapter import Adapter, LazyLayers, TunedAdapter
from spectune.adapters.writer import adapter_hash
from spectune.core.delta import Delta, delta_between
from spectune.core.low_rank import LowRank, weight_shape
from spectune.core.rounding import dtype_name
from spectune.errors import InputError, PairingError, counted, some_of
from spectune.files.dtypes import DTYPES_BY_SAFETENSORS_NAME
from spectune.files.provenance import Role
from spectune.files.source import WeightSource
from spectune.pairs.overlap import Place, overlap_of_adapters
from spectune.pairs.residual_file import PRINCIPAL_DTYPE_KEY
from spectune.pairs.rules import short_hash


def trained_deltas(trained: Adapter | TunedAdapter, original: Adapter | TunedAdapter) -> TunedAdapter:
    """Return dA = A - A0 and dB = B - B0 of every layer in float32, with A0 and B0 as the frame.

    The differences are exact if both factors are 16-bit and close to each other (Sterbenz 1974). If `trained`
    has a narrower dtype, A0 and B0 are rounded to it first: rounding is no training. Raises InputError for
    tuned adapters, if layers, ranks, shapes or scales differ, and if only rounding changed; PairingError if
    `trained` was not trained from `original`.
    """
    for adapter, what in ((trained, "a trained principal"), (original, "the principal it was trained from")):
        if isinstance(adapter, TunedAdapter):
            raise InputError(
                f"{adapter.label} is a tuned adapter: expected {what}",
                hint="leave out `principal`: a tuned adapter contains its frame",
            )
    assert isinstance(trained, Adapter)
    assert isinstance(original, Adapter)
    unknown = [name for name in trained.layers if name not in original.layers]
    if unknown:
        raise InputError(
            f"{len(unknown)} of {len(trained.layers)} layers of {trained.label} are not in {original.label}: "
            f"{some_of(unknown)}",
            hint="pass the principal that it was trained from as `principal`",
        )
    ranks = {name: trained.rank(name) for name in trained.layers}
    resized = [name for name, rank in ranks.items() if rank != original.rank(name)]
    if resized:
        name = resized[0]
        raise InputError(
            f"{len(resized)} layers of {trained.label} have another rank than in {original.label}: "
            f"{name} has {ranks[name]}, expected {original.rank(name)}",
            hint="train with the ranks of the principal: set network_dim and conv_dim to them",
        )
    shapes = {name: (_shape_of(trained, name), _shape_of(original, name)) for name in trained.layers}
    misfits = [name for name, (one, other) in shapes.items() if one != other]
    if misfits:
        one, other = shapes[misfits[0]]
        raise InputError(
            f"{len(misfits)} of {len(shapes)} layers have another shape in {trained.label} than in "
            f"{original.label}: {misfits[0]} has {one}, expected {other}",
            hint="the two belong to models of different sizes: pass the principal it was trained from",
        )
    original_hash = adapter_hash(original)
    _check_pair(trained, original, original_hash)
    _check_more_than_rounding(trained, original)

    def delta(name: str) -> Delta:
        before, after = original.layers[name], trained.layers[name]
        _check_scale(name, before, after, original.label, trained.label)
        return delta_between(_rounded_like(before, after.down.dtype), after)

    declared, origin = trained.provenance, original.provenance
    provenance = replace(
        declared,
        role=Role.TUNED,
        base_hash=origin.base_hash,
        base_name=origin.base_name,
        principal_hash=original_hash,
        prediction=declared.prediction or origin.prediction,
    )
    return TunedAdapter(
        LazyLayers(ranks, dict.fromkeys(ranks, torch.float32), delta),
        {**trained.metadata, **provenance.to_metadata()},
        trained.label,
        (*trained.warnings, *_rounding_note(trained, original)),
        None,
        trained.catalogue,
    )


def rounded_factors(residual: WeightSource, adapter: Adapter | TunedAdapter) -> tuple[str, ...]:
    """Return a warning if a trained principal has a narrower dtype than the principal of `residual`."""
    dtype = DTYPES_BY_SAFETENSORS_NAME.get(residual.metadata.get(PRINCIPAL_DTYPE_KEY, ""))
    if dtype is None or not isinstance(adapter, Adapter):
        return ()
    found = [adapter.dtype(name) for name in adapter.layers if _is_narrower(adapter.dtype(name), dtype)]
    if not found:
        return ()
    word = dtype_name(found[0])
    return (
        f"the factors of {counted(len(found), 'layer')} of {adapter.label} were rounded from "
        f"{dtype_name(dtype)} to {word}: this changes the model too; a principal by "
        f"`spectune split --dtype {word}` stays exact",
    )


def _is_narrower(dtype: torch.dtype, than: torch.dtype) -> bool:
    return torch.finfo(dtype).eps > torch.finfo(than).eps


def _rounded_like(low_rank: LowRank, dtype: torch.dtype) -> LowRank:
    """Return factors rounded to `dtype` if that has fewer significant bits."""
    if not _is_narrower(dtype, low_rank.down.dtype):
        return low_rank
    return LowRank(low_rank.down.to(dtype), low_rank.up.to(dtype), low_rank.alpha)


def _check_more_than_rounding(trained: Adapter, original: Adapter) -> None:
    """Raise InputError if `trained` equals `original` rounded to 16 bits, in whichever dtype it is stored."""
    for dtype in (torch.bfloat16, torch.float16):
        narrower = any(_is_narrower(dtype, original.dtype(name)) for name in trained.layers)
        if narrower and all(_is_rounded(original, trained, name, dtype) for name in trained.layers):
            word = dtype_name(dtype)
            raise InputError(
                f"{trained.label} equals {original.label} rounded to {word}: training changed nothing",
                hint=f"raise the learning rate; `spectune split --dtype {word}` writes a principal that such "
                "a trainer does not round",
            )


def _is_rounded(original: Adapter, trained: Adapter, name: str, dtype: torch.dtype) -> bool:
    before, after = original.layers[name], trained.layers[name]
    pairs = ((before.down, after.down), (before.up, after.up))
    return all(torch.equal(one.to(dtype).float(), other.float()) for one, other in pairs)


def _rounding_note(trained: Adapter, original: Adapter) -> tuple[str, ...]:
    rounded = [name for name in trained.layers if _is_narrower(trained.dtype(name), original.dtype(name))]
    if not rounded:
        return ()
    return (
        f"{counted(len(rounded), 'layer')} of {trained.label} have a narrower dtype than in {original.label}"
        ": the change is measured from the rounded principal",
    )


def _shape_of(adapter: Adapter, name: str) -> tuple[int, ...]:
    if adapter.catalogue is not None and name in adapter.catalogue.by_name:
        return adapter.catalogue.by_name[name].shape
    return weight_shape(adapter.layers[name])


def _check_pair(trained: Adapter, original: Adapter, original_hash: str) -> None:
    made_from = trained.provenance.principal_hash
    if made_from is not None and made_from != original_hash:
        raise PairingError(
            f"{trained.label} replaces principal {short_hash(made_from)}, "
            f"{original.label} is {short_hash(original_hash)}",
            hint="pass the principal that it was trained from as `principal`",
        )
    overlap = overlap_of_adapters(original, trained)
    if overlap.place is not Place.INSIDE:
        for name, after in trained.layers.items():
            _check_scale(name, original.layers[name], after, original.label, trained.label)
        raise PairingError(
            f"{trained.label} does not look like {original.label} after training: it contains only "
            f"{overlap.projection:.0%} of it",
            hint="pass the principal that it was trained from as `principal`",
        )


def _check_scale(name: str, before: LowRank, after: LowRank, original: str, trained: str) -> None:
    if after.scale != before.scale:
        raise InputError(
            f"{name} has scale {after.scale:g} in {trained} and {before.scale:g} in {original}: expected the "
            "same scale",
            hint="train with alpha = rank: set network_alpha and conv_alpha to the rank",
        )
