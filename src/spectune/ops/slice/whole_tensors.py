"""Slice tuned adapters that replace tensors of their base: complete parts are copied."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from spectune.adapters.adapter import REPLACED
from spectune.adapters.spellings import adapter_part
from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.provenance import Role
from spectune.files.reader import Checkpoint
from spectune.ops.options.adapter_files import SliceOptions
from spectune.ops.options.values import Slice
from spectune.ops.other_kinds import check_no_options, copy_tensors
from spectune.ops.shared import refuse_overwriting
from spectune.ops.slice.adapters import SliceReport
from spectune.ops.slice.plan import SliceResult, record_source, slices_metadata
from spectune.pairs.rules import short_hash
from spectune.sdxl.layout import part_of

_PARTS = {"unet": ("unet",), "te": ("te1", "te2"), "te1": ("te1",), "te2": ("te2",)}


def slice_whole_tensors(options: SliceOptions) -> SliceReport:
    """Write the tensors of the parts that the slices select. Progress counts tensors.

    Raises InputError for weights, traits that are not parts, sums, and files of different bases.
    """
    slices, out = options.slices, options.out
    names = ("keys", "dtype", "traits")
    check_no_options(options, SliceOptions(slices, out), names, slices[0].path.name)
    with ExitStack() as stack:
        opened: dict[Path, Checkpoint] = {}
        for piece in slices:
            if piece.path not in opened:
                opened[piece.path] = stack.enter_context(open_checkpoint(piece.path))
        refuse_overwriting(out, list(opened.values()))
        _check_files(list(opened.values()))
        source_of: dict[str, Checkpoint] = {}
        results: list[SliceResult] = []
        for piece in slices:
            source = opened[piece.path]
            kept = _selected(piece, source)
            record_source(source_of, kept, source, hint="choose parts that do not overlap")
            removed = [key for key in source.tensors if key not in kept]
            results.append(SliceResult(piece, _names(kept), _names(removed)))
        metadata = {**opened[slices[0].path].metadata, **slices_metadata(slices)}
        written = copy_tensors(out, source_of, metadata, force=options.force, progress=options.progress)
    return SliceReport(out, written, Role.TUNED, tuple(results), (), ())


def _check_files(sources: list[Checkpoint]) -> None:
    for source in sources:
        if source.provenance.role is not Role.TUNED:
            raise InputError(
                f"{source.label} is not a tuned adapter: the other files replace complete tensors",
                hint="write the changes as plain LoRAs first: `spectune export MODEL FILE`",
            )
    bases = {source.provenance.base_hash or "unknown": source.label for source in sources}
    if len(bases) > 1:
        made = ", ".join(f"{label} of {short_hash(base)}" for base, label in bases.items())
        raise InputError(
            f"complete tensors of different bases cannot be combined: {made}",
            hint="rebuild the checkpoints and combine those: `spectune slice` or `spectune merge`",
        )


def _selected(piece: Slice, source: Checkpoint) -> list[str]:
    """Return the keys of the parts that a slice keeps."""
    if piece.weight != 1:
        raise InputError(
            f"{piece}: complete tensors are copied, so a weight cannot apply",
            hint="`spectune rebuild --strength` scales the change",
        )
    if piece.trait is None:
        return list(source.tensors)
    if piece.trait not in _PARTS:
        raise InputError(
            f"{piece}: {source.label} replaces complete tensors, which are sliced by part: expected one of "
            f"{', '.join(_PARTS)}",
            hint="`spectune export MODEL FILE` writes a plain LoRA, which has all traits",
        )
    kept = [key for key in source.tensors if _part(key) in _PARTS[piece.trait]]
    if not kept:
        raise InputError(f"{piece}: {source.label} changes nothing there", hint="choose another part")
    return kept


def _names(keys: list[str]) -> tuple[str, ...]:
    return tuple(f"{_part(key)}.{key.removeprefix(REPLACED)}" for key in keys)


def _part(key: str) -> str | None:
    return part_of(key.removeprefix(REPLACED)) if key.startswith(REPLACED) else adapter_part(key)
