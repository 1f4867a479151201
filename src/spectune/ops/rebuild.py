"""Rebuild a full checkpoint from a base and an adapter."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from spectune.adapters.adapter import AnyAdapter, TunedAdapter
from spectune.adapters.reader import open_any_adapter
from spectune.checkpoints.open import open_checkpoint, open_writer
from spectune.files.dtypes import parse_weight_dtype
from spectune.files.provenance import ADAPTERS_KEY, Provenance, Role, modelspec_model, parse_json
from spectune.files.weights_hash import WeightsHasher
from spectune.operation import operation
from spectune.ops.model_card import check_card, write_card
from spectune.ops.options.adapter_files import RebuildOptions
from spectune.ops.shared import STALE, Hashed, is_checkpoint, refuse_overwriting, template_of, write_all
from spectune.pairs.merged import Merged, Restored, merged
from spectune.pairs.rules import BaseKind, check_base_hash
from spectune.pairs.strength import Strength, parse_strength, strength_of
from spectune.sdxl.layers import Catalogue, build_catalogue


@dataclass(frozen=True)
class RebuildReport:
    """The result of `rebuild`. Hashes are computed from the weights, not from the files."""

    path: Path
    hash: str
    base_hash: str | None  # of the base that was read; None for a residual
    original_hash: str | None  # of the model that the adapter was made from, if recorded
    changed_tensors: int  # tensors whose bits, dtype or shape differ from the base
    tensors: int
    warnings: tuple[str, ...] = ()  # of the adapter
    layers: Mapping[str, tuple[int, int]] = field(
        default_factory=dict[str, tuple[int, int]]
    )  # by part: (layers in the adapter, default layers of the model)
    card: Path | None = None

    @property
    def identical(self) -> bool:
        """Return whether every bit equals the original model, or the base if no original is recorded."""
        return self.hash == (self.original_hash or self.base_hash)


@operation(RebuildOptions)
def rebuild(options: RebuildOptions) -> RebuildReport:
    """Write the full model: original + tuned adapter or LoRA, or residual + principal.

    Changed tensors are cast to `dtype` if it is set. With `cast_all`, so are all other tensors of the UNet
    and the text encoders. All remaining tensors are copied byte for byte. Progress counts tensors.

    Raises PairingError and leaves no file if the adapter was trained from another base.
    """
    if options.card:
        check_card(options.out, force=options.force)
    options, swapped = _model_first(options)
    base, adapter, out = options.base, options.adapter, options.out
    strength = _strength(options.strength)
    dtype = None if options.dtype is None else parse_weight_dtype(options.dtype)
    with (
        open_checkpoint(base) as source,
        open_any_adapter(adapter, catalogue := build_catalogue(source, all_layers=True)) as opened,
    ):
        refuse_overwriting(out, [source, opened])
        # Adapters record the hash of the original model, never that of a residual.
        is_residual = BaseKind.of(source) is BaseKind.RESIDUAL
        # The hash is updated while tensors are written, so `merged` must read single layers from `source`.
        model = merged(source, [(opened, strength)], dtype=dtype, cast_all=options.cast_all)
        hashed = None if is_residual else Hashed(source, WeightsHasher())
        if hashed is not None:
            assert isinstance(model, Merged)
            model = model.over(hashed)
        metadata = {key: value for key, value in model.metadata.items() if key not in STALE}
        metadata |= modelspec_model(source.metadata, title=out.name.removesuffix(".safetensors"))
        metadata[ADAPTERS_KEY] = _adapters_entry(source.metadata, adapter, opened, strength)
        infos = list(model.tensors.values())
        warnings = [*swapped, *opened.warnings, *model.warnings]
        with open_writer(
            out, infos, metadata=metadata, force=options.force, template=template_of(source)
        ) as writer:
            write_all(model, writer, options.progress)
            base_hash = None
            if hashed is not None:
                base_hash = hashed.hasher.hexdigest()
                warnings += filter(None, [check_base_hash(base_hash, opened, source.label)])
                writer.metadata.update(Provenance(base_hash=base_hash, base_name=source.label).to_metadata())
    return RebuildReport(
        path=out,
        hash=writer.hash,
        base_hash=base_hash,
        original_hash=opened.provenance.base_hash,
        changed_tensors=_count_changed(model) if hashed is None else writer.differing(hashed.hasher),
        tensors=len(model.tensors),
        warnings=tuple(warnings),
        layers=_coverage(opened, catalogue),
        card=write_card(out, adapter, writer.hash) if options.card else None,
    )


def _strength(value: str | float | Mapping[str, float]) -> Strength:
    return parse_strength(value) if isinstance(value, str) else strength_of(value)


def _model_first(options: RebuildOptions) -> tuple[RebuildOptions, tuple[str, ...]]:
    """Return the options with model and adapter in the right order, and a note if they were swapped."""
    if is_checkpoint(options.base) or not is_checkpoint(options.adapter):
        return options, ()
    note = f"pass the model first: rebuild {options.adapter.name} {options.base.name}"
    return replace(options, base=options.adapter, adapter=options.base), (note,)


def _count_changed(model: Merged | Restored) -> int:
    """Count the tensors that the principal changes or that have another dtype in the model."""
    if isinstance(model, Merged):
        return len(model.touched)
    before = model.residual.tensors
    recast = {name for name, info in model.tensors.items() if name in before and info != before[name]}
    return len(recast | model.principals.keys())


def _adapters_entry(metadata: Mapping[str, str], path: Path, adapter: AnyAdapter, strength: Strength) -> str:
    """Return the metadata entry that lists the adapters of a model, those of its base first."""
    entry = {"file": path.name, "role": adapter.provenance.role or Role.LORA, "strength": str(strength)}
    earlier = parse_json(metadata.get(ADAPTERS_KEY, "[]"))
    return json.dumps([*(earlier if isinstance(earlier, list) else []), entry])


def _coverage(adapter: AnyAdapter, catalogue: Catalogue) -> dict[str, tuple[int, int]]:
    """Return (layers in the adapter, all default layers) of each part."""
    counts = Counter(layer.part.value for layer in catalogue if layer.default)
    replaced = set(adapter.replaced) if isinstance(adapter, TunedAdapter) else set[str]()
    covered = Counter(
        layer.part.value
        for layer in catalogue
        if layer.default and (layer.name in adapter.layers or layer.tensor in replaced)
    )
    return {part: (covered[part], count) for part, count in counts.items()}
