"""Slice adapters that are more than a product of two factors per layer: their tensors are copied."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from spectune.adapters.adapter import AnyAdapter, GeneralAdapter
from spectune.adapters.reader import AS_PLAIN_LORA, open_any_adapter
from spectune.adapters.traits import TraitRule, read_traits, trait_layers
from spectune.errors import InputError
from spectune.files.provenance import Role
from spectune.files.reader import Checkpoint
from spectune.ops.options.adapter_files import SliceOptions
from spectune.ops.options.values import Slice
from spectune.ops.other_kinds import check_no_options, copy_tensors
from spectune.ops.shared import catalogue_of, refuse_overwriting
from spectune.ops.slice.adapters import SliceReport
from spectune.ops.slice.plan import SliceResult, record_source, slices_metadata


def slice_other_kinds(options: SliceOptions) -> SliceReport:
    """Write the tensors of the layers that the slices select.

    Biases, norms and embeddings are kept if no layer of their part is removed. Progress counts tensors.

    Raises InputError for weights, sums, and files that are products of two factors.
    """
    slices, out = options.slices, options.out
    names = ("keys", "dtype")
    check_no_options(options, SliceOptions(slices, out), names, slices[0].path.name)
    traits = {} if options.traits is None else read_traits(options.traits)
    with ExitStack() as stack:
        catalogue = None if options.base is None else catalogue_of(options.base, out)
        opened: dict[Path, AnyAdapter] = {}
        for piece in slices:
            if piece.path not in opened:
                opened[piece.path] = stack.enter_context(open_any_adapter(piece.path, catalogue))
        refuse_overwriting(out, list(opened.values()))
        source_of: dict[str, Checkpoint] = {}
        results: list[SliceResult] = []
        for piece in slices:
            adapter = opened[piece.path]
            result, keys = _selected(piece, adapter, traits)
            assert adapter.file is not None
            hint = "choose traits that do not overlap, or sum plain LoRAs of `spectune export`"
            record_source(source_of, keys, adapter.file, hint=hint)
            results.append(result)
        metadata = {**opened[slices[0].path].metadata, **slices_metadata(slices)}
        written = copy_tensors(out, source_of, metadata, force=options.force, progress=options.progress)
        warnings = tuple(text for adapter in opened.values() for text in adapter.warnings)
    return SliceReport(out, written, Role.LORA, tuple(results), (), (), warnings)


def _selected(
    piece: Slice, adapter: AnyAdapter, traits: dict[str, TraitRule]
) -> tuple[SliceResult, list[str]]:
    """Return the names of the layers that a slice keeps and removes, and the keys that it keeps."""
    if not isinstance(adapter, GeneralAdapter):
        raise InputError(f"{adapter.label} is of another kind than the other files", hint=AS_PLAIN_LORA)
    if piece.weight != 1:
        raise InputError(f"{piece}: the tensors are copied, so a weight cannot apply", hint=AS_PLAIN_LORA)
    assert adapter.catalogue is not None
    assert adapter.file is not None
    layers = tuple(layer for layer in adapter.catalogue if layer.name in adapter.layers)
    kept = {
        layer.name for layer in trait_layers(replace(adapter.catalogue, layers=layers), piece.trait, traits)
    }
    removed = [layer.name for layer in layers if layer.name not in kept]
    parts = {name.partition(".")[0] for name in kept} - {name.partition(".")[0] for name in removed}
    for name in adapter.keys:
        if name not in adapter.layers:
            whole = piece.trait is None or name.partition(".")[0] in parts
            kept, removed = (kept | {name}, removed) if whole else (kept, [*removed, name])
    keys = [key for name in adapter.keys if name in kept for key in adapter.keys[name].values()]
    if piece.trait is None:
        keys = list(adapter.file.tensors)
    in_order = tuple(name for name in adapter.keys if name in kept)
    return SliceResult(piece, in_order, tuple(removed)), keys
