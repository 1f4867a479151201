"""Plan which layers a sliced adapter takes from which files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spectune.adapters.adapter import Adapter, TunedAdapter
from spectune.adapters.traits import TraitRule, trait_layers
from spectune.adapters.writer import adapter_hash
from spectune.errors import InputError, PairingError, counted, some_of
from spectune.files.provenance import SLICES_KEY, Provenance, Role
from spectune.files.reader import Checkpoint
from spectune.ops.options.values import Slice
from spectune.pairs.rules import AdapterKind, short_hash
from spectune.sdxl.layers import Catalogue, Layer, squeezed


@dataclass(frozen=True)
class SliceResult:
    """The names of the layers that one slice takes from its file, and of those that it leaves out."""

    slice: Slice
    kept: tuple[str, ...]
    removed: tuple[str, ...]


@dataclass(frozen=True)
class SlicePlan:
    """The slices that are summed for each layer of the new adapter."""

    layers: tuple[Layer, ...]
    sources: Mapping[str, tuple[Slice, ...]]  # by layer
    results: tuple[SliceResult, ...]

    @classmethod
    def of(
        cls,
        slices: Sequence[Slice],
        opened: Mapping[Path, Adapter | TunedAdapter],
        traits: Mapping[str, TraitRule],
    ) -> SlicePlan:
        layers: dict[str, Layer] = {}
        sources: dict[str, tuple[Slice, ...]] = {}
        results: list[SliceResult] = []
        for piece in slices:
            adapter = opened[piece.path]
            catalogue = _own_layers(adapter)
            kept = trait_layers(catalogue, piece.trait, traits)
            for layer in kept:
                first = layers.setdefault(layer.name, layer)
                if squeezed(first.shape) != squeezed(layer.shape):
                    raise InputError(
                        f"{layer.name} is {layer.shape} in {adapter.label} and {first.shape} in "
                        f"{sources[layer.name][0].path.name}",
                        hint="combine adapters for models of the same size",
                    )
                sources[layer.name] = (*sources.get(layer.name, ()), piece)
            names = {layer.name for layer in kept}
            removed = tuple(layer.name for layer in catalogue if layer.name not in names)
            results.append(SliceResult(piece, tuple(layer.name for layer in kept), removed))
        order = {name: place for place, name in enumerate(_order(opened.values()))}
        in_order = tuple(sorted(layers.values(), key=lambda layer: order[layer.name]))
        return cls(in_order, sources, tuple(results))

    @property
    def overlaps(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers if len(self.sources[layer.name]) > 1)

    @property
    def leading(self) -> Path:
        """Return the file with the most UNet layers, or the first file if there are no UNet layers."""
        of_unet = [pieces for name, pieces in self.sources.items() if name.startswith("unet.")]
        counted = Counter(piece.path for pieces in of_unet for piece in pieces)
        return counted.most_common(1)[0][0] if counted else self.results[0].slice.path

    @property
    def unchanged(self) -> bool:
        """Return whether every layer is an unchanged layer of one file."""
        return not self.overlaps and all(
            piece.weight == 1 for pieces in self.sources.values() for piece in pieces
        )


def _own_layers(adapter: Adapter | TunedAdapter) -> Catalogue:
    assert adapter.catalogue is not None
    layers = tuple(layer for layer in adapter.catalogue if layer.name in adapter.layers)
    return Catalogue(layers, adapter.catalogue.unet)


def _order(adapters: Iterable[Adapter | TunedAdapter]) -> list[str]:
    """Return all layers in the order of the network. Each file has its layers in that order."""
    names = dict.fromkeys(name for adapter in adapters for name in adapter.layers)
    parts = ("unet.", "te1.", "te2.")
    return [name for part in parts for name in names if name.startswith(part)]


def role_of(plan: SlicePlan, opened: Mapping[Path, Adapter | TunedAdapter]) -> tuple[Role, tuple[str, ...]]:
    """Return the role of the new file, and warnings."""
    declared = {path: adapter.provenance for path, adapter in opened.items()}
    principals = [path for path, adapter in opened.items() if AdapterKind.of(adapter).is_principal]
    bases = {declared[path].base_hash for path in opened}
    recorded = {base for base in bases if base is not None}
    if principals and len(principals) < len(opened):
        other = next(path for path in opened if path not in principals)
        raise PairingError(
            f"{principals[0].name} is a principal, which needs a residual, and {other.name} is not: they "
            "cannot be combined",
            hint="export the trained principal as a plain LoRA first",
        )
    warnings: list[str] = []
    if principals:
        if not plan.unchanged:
            warnings.append("a principal that is weighted or summed no longer fits its residual")
        if len(recorded) > 1:
            warnings.append(
                f"the principals belong to different models ({_hashes(recorded)}): with the residual of one, "
                "layers of the other are only approximate"
            )
        return Role.PRINCIPAL, tuple(warnings)
    tuned = [isinstance(adapter, TunedAdapter) for adapter in opened.values()]
    if all(tuned) and plan.unchanged and len(bases) == 1:
        return Role.TUNED, ()
    if any(tuned):
        warnings.append(
            "trained deltas that are weighted, summed or combined with other adapters become a plain LoRA: "
            "use it with the original model, not with a residual"
        )
    if len(recorded) > 1:
        warnings.append(
            f"the adapters were made for different models ({_hashes(recorded)}): quality may differ; check "
            "samples"
        )
    unet = {declared[piece.path].prediction for layer in plan.layers for piece in plan.sources[layer.name]
            if layer.part.value == "unet"} - {None}  # fmt: skip
    if len(unet) > 1:
        warnings.append(
            f"UNet layers trained for different predictions are summed: {', '.join(sorted(map(str, unet)))}"
        )
    return Role.LORA, tuple(warnings)


def _hashes(bases: set[str]) -> str:
    return ", ".join(short_hash(base) for base in sorted(bases))


def provenance_of(plan: SlicePlan, opened: Mapping[Path, Adapter | TunedAdapter], role: Role) -> Provenance:
    """Return the provenance of the new file: the base if all agree, the prediction of the UNet layers."""
    declared = [adapter.provenance for adapter in opened.values()]
    result = opened[plan.leading].provenance
    if len({one.base_hash for one in declared}) > 1:
        result = replace(result, base_hash=None, base_name=None)
    principals = {_principal_hash(adapter) for adapter in opened.values()}
    # a weighted or summed principal no longer fits its residual
    fits = plan.unchanged and len(principals) == 1 and any(one.principal_hash for one in declared)
    result = replace(result, principal_hash=principals.pop() if fits else None)
    if role is Role.LORA:
        result = replace(result, principal_hash=None)
    return result


def _principal_hash(adapter: Adapter | TunedAdapter) -> str | None:
    """Return the hash of the principal that an adapter was trained from, or its own if it is untrained."""
    if AdapterKind.of(adapter) is AdapterKind.PRINCIPAL:
        assert isinstance(adapter, Adapter)
        return adapter_hash(adapter)
    return adapter.provenance.principal_hash


def slices_metadata(slices: Sequence[Slice]) -> dict[str, str]:
    """Return the metadata entry that lists the slices."""
    entries = [{"file": piece.path.name, "trait": piece.trait, "weight": piece.weight} for piece in slices]
    return {SLICES_KEY: json.dumps(entries)}


def record_source(
    source_of: dict[str, Checkpoint], keys: Sequence[str], source: Checkpoint, *, hint: str
) -> None:
    """Record that the tensors `keys` are copied from `source`.

    Raises:
        InputError: An earlier slice has one of these tensors.
    """
    if twice := [key for key in keys if key in source_of]:
        raise InputError(
            f"{counted(len(twice), 'tensor')} in more than one slice cannot be summed: {some_of(twice)}",
            hint=hint,
        )
    source_of |= dict.fromkeys(keys, source)
