"""Rebuilding a full checkpoint file from a base and an adapter."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from spectune.adapters.adapter import Adapter, TunedAdapter
from spectune.adapters.reader import open_adapter
from spectune.checkpoints.open import open_checkpoint, open_writer
from spectune.checkpoints.plain_weights import check_plain_weights
from spectune.files.dtypes import parse_weight_dtype
from spectune.files.provenance import ADAPTERS_KEY, Provenance, Role, modelspec_model, parse_json
from spectune.files.weights_hash import WeightsHasher
from spectune.operation import operation
from spectune.ops.options.adapter_files import RebuildOptions
from spectune.ops.shared import STALE, Hashed, is_checkpoint, refuse_overwriting, template_of, write_all
from spectune.pairs.merged import Merged, Restored, merged
from spectune.pairs.rules import BaseKind, check_base_hash
from spectune.pairs.strength import Strength, parse_strength, strength_of
from spectune.sdxl.layers import Catalogue, build_catalogue


@dataclass(frozen=True)
class RebuildReport:
    """What `rebuild` wrote; hashes are of the numbers, not of the files."""

    path: Path
    hash: str
    base_hash: str | None  # of the file that was built upon; None for a residual
    original_hash: str | None  # of the model that the files were made from, if they say so
    changed_tensors: int  # whose bits, type or shape are not those of the base
    tensors: int
    warnings: tuple[str, ...] = ()  # of the adapter
    layers: Mapping[str, tuple[int, int]] = field(
        default_factory=dict[str, tuple[int, int]]
    )  # by part: in the adapter, of all

    @property
    def identical(self) -> bool:
        """Every bit is that of the original model, or where none is recorded, of the base."""
        return self.hash == (self.original_hash or self.base_hash)


@operation(RebuildOptions)
def rebuild(options: RebuildOptions) -> RebuildReport:
    """Write the whole model: original + tuned adapter or LoRA, or residual + principal.

    Changed tensors keep their dtype unless `dtype` names another, and with `cast_all` so do the others of
    the UNet and the encoders. Every other tensor is copied byte for byte. Progress counts tensors.

    Raises PairingError, and leaves no file, if the adapter records another base than the one that was read.
    """
    options, swapped = _model_first(options)
    base, adapter, out = options.base, options.adapter, options.out
    strength = _strength(options.strength)
    dtype = None if options.dtype is None else parse_weight_dtype(options.dtype)
    with (
        open_checkpoint(base) as source,
        open_adapter(adapter, catalogue := build_catalogue(source, all_layers=True), replaced=True) as opened,
    ):
        refuse_overwriting(out, [source, opened])
        check_plain_weights(source)
        # a residual has no hash that anything refers to; the original it gives back has
        is_residual = BaseKind.of(source) is BaseKind.RESIDUAL
        # the hash is taken of the numbers as they pass: what looks at single layers beforehand reads past it
        model = merged(source, [(opened, strength)], dtype=dtype, cast_all=options.cast_all)
        hashed = None if is_residual else Hashed(source, WeightsHasher())
        if hashed is not None:
            assert isinstance(model, Merged)
            model = model.over(hashed)
        metadata = {key: value for key, value in model.metadata.items() if key not in STALE}
        metadata |= modelspec_model(source.metadata, title=out.name.removesuffix(".safetensors"))
        metadata[ADAPTERS_KEY] = _described(source.metadata, adapter, opened, strength)
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
        changed_tensors=_factored(model) if hashed is None else writer.differing(hashed.hasher),
        tensors=len(model.tensors),
        warnings=tuple(warnings),
        layers=_coverage(opened, catalogue),
    )


def _strength(value: str | float | Mapping[str, float]) -> Strength:
    return parse_strength(value) if isinstance(value, str) else strength_of(value)


def _model_first(options: RebuildOptions) -> tuple[RebuildOptions, tuple[str, ...]]:
    """Return the options with the model and the adapter in their places, and a note where they were not."""
    if is_checkpoint(options.base) or not is_checkpoint(options.adapter):
        return options, ()
    note = f"the model comes first: rebuild {options.adapter.name} {options.base.name}"
    return replace(options, base=options.adapter, adapter=options.base), (note,)


def _factored(model: Merged | Restored) -> int:
    """The tensors of a residual that the principal changes, or that have another type in the model."""
    if isinstance(model, Merged):
        return len(model.changes.keys() | model.replaced.keys())
    before = model.residual.tensors
    recast = {name for name, info in model.tensors.items() if name in before and info != before[name]}
    return len(recast | model.principals.keys())


def _described(
    metadata: Mapping[str, str], path: Path, adapter: Adapter | TunedAdapter, strength: Strength
) -> str:
    """What a model is made with, after what its base was made with."""
    told = adapter.provenance
    entry = {"file": path.name, "role": told.role or Role.LORA, "strength": str(strength)}
    earlier = parse_json(metadata.get(ADAPTERS_KEY, "[]"))
    return json.dumps([*(earlier if isinstance(earlier, list) else []), entry])


def _coverage(adapter: Adapter | TunedAdapter, catalogue: Catalogue) -> dict[str, tuple[int, int]]:
    """How many of the default layers of each part the adapter has."""
    of_all = Counter(layer.part.value for layer in catalogue if layer.default)
    found = Counter(layer.part.value for layer in catalogue if layer.default and layer.name in adapter.layers)
    return {part: (found[part], count) for part, count in of_all.items()}
