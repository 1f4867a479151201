"""What a new adapter takes of which files: the plan behind `slice`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spectune.adapters.adapter import Adapter, TunedAdapter
from spectune.adapters.traits import TraitRule, trait_layers
from spectune.adapters.writer import adapter_hash
from spectune.errors import InputError, PairingError
from spectune.files.provenance import SLICES_KEY, Provenance, Role
from spectune.ops.options.values import Slice
from spectune.pairs.rules import AdapterKind, short_hash
from spectune.sdxl.layers import Catalogue, Layer, squeezed


@dataclass(frozen=True)
class SliceResult:
    """What one slice took and what of its file stayed behind; layers by name."""

    slice: Slice
    kept: tuple[str, ...]
    removed: tuple[str, ...]


@dataclass(frozen=True)
class SlicePlan:
    """Which slices each layer of the new adapter is the sum of."""

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
        found: dict[str, Layer] = {}
        sources: dict[str, tuple[Slice, ...]] = {}
        results: list[SliceResult] = []
        for piece in slices:
            adapter = opened[piece.path]
            catalogue = _own_layers(adapter)
            kept = trait_layers(catalogue, piece.trait, traits)
            for layer in kept:
                first = found.setdefault(layer.name, layer)
                if squeezed(first.shape) != squeezed(layer.shape):
                    raise InputError(
                        f"{layer.name} is {layer.shape} in {adapter.label} and {first.shape} in "
                        f"{sources[layer.name][0].path.name}",
                        hint="the adapters belong to models of different sizes",
                    )
                sources[layer.name] = (*sources.get(layer.name, ()), piece)
            names = {layer.name for layer in kept}
            left = tuple(layer.name for layer in catalogue if layer.name not in names)
            results.append(SliceResult(piece, tuple(layer.name for layer in kept), left))
        order = {name: place for place, name in enumerate(_order(opened.values()))}
        layers = tuple(sorted(found.values(), key=lambda layer: order[layer.name]))
        return cls(layers, sources, tuple(results))

    @property
    def overlaps(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers if len(self.sources[layer.name]) > 1)

    @property
    def leading(self) -> Path:
        """The file of which the most UNet layers are; the first one if there are none."""
        of_unet = [pieces for name, pieces in self.sources.items() if name.startswith("unet.")]
        counted = Counter(piece.path for pieces in of_unet for piece in pieces)
        return counted.most_common(1)[0][0] if counted else self.results[0].slice.path

    @property
    def untouched(self) -> bool:
        """Every layer is one of a file as it is."""
        return not self.overlaps and all(
            piece.weight == 1 for pieces in self.sources.values() for piece in pieces
        )


def _own_layers(adapter: Adapter | TunedAdapter) -> Catalogue:
    assert adapter.catalogue is not None
    layers = tuple(layer for layer in adapter.catalogue if layer.name in adapter.layers)
    return Catalogue(layers, adapter.catalogue.unet)


def _order(adapters: Iterable[Adapter | TunedAdapter]) -> list[str]:
    """All layers in the order of the network: each file has its own in that order."""
    names = dict.fromkeys(name for adapter in adapters for name in adapter.layers)
    parts = ("unet.", "te1.", "te2.")
    return [name for part in parts for name in names if name.startswith(part)]


def role_of(plan: SlicePlan, opened: Mapping[Path, Adapter | TunedAdapter]) -> tuple[Role, tuple[str, ...]]:
    """What the new file is, and what is to be said about it."""
    told = {path: adapter.provenance for path, adapter in opened.items()}
    principals = [path for path, adapter in opened.items() if AdapterKind.of(adapter).is_principal]
    bases = {told[path].base_hash for path in opened}
    known = {base for base in bases if base is not None}
    if principals and len(principals) < len(opened):
        other = next(path for path in opened if path not in principals)
        raise PairingError(
            f"{principals[0].name} is a principal, which goes on a residual, and {other.name} is not: no "
            "model takes both",
            hint="export a plain LoRA of the trained principal first",
        )
    warnings: list[str] = []
    if principals:
        if not plan.untouched:
            warnings.append("a principal that is weighted or summed no longer fits what the residual lacks")
        if len(known) > 1:
            warnings.append(
                f"the principals are of different models ({_hashes(known)}): on the residual of one of them "
                "the other's layers are approximate"
            )
        return Role.PRINCIPAL, tuple(warnings)
    tuned = [isinstance(adapter, TunedAdapter) for adapter in opened.values()]
    if all(tuned) and plan.untouched and len(bases) == 1:
        return Role.TUNED, ()
    if any(tuned):
        warnings.append(
            "trained deltas that are weighted, summed or put beside others become a plain LoRA: it goes on "
            "the original, and not beside a residual"
        )
    if len(known) > 1:
        warnings.append(
            f"the adapters were made for different models ({_hashes(known)}): how well they go together only "
            "pictures tell"
        )
    unet = {told[piece.path].prediction for layer in plan.layers for piece in plan.sources[layer.name]
            if layer.part.value == "unet"} - {None}  # fmt: skip
    if len(unet) > 1:
        warnings.append(f"UNet layers trained for {' and '.join(sorted(map(str, unet)))} are summed")
    return Role.LORA, tuple(warnings)


def _hashes(bases: set[str]) -> str:
    return ", ".join(short_hash(base) for base in sorted(bases))


def provenance_of(plan: SlicePlan, opened: Mapping[Path, Adapter | TunedAdapter], role: Role) -> Provenance:
    """What the new file says: where it comes from if all agree, what it predicts as the UNet's layers do."""
    told = [adapter.provenance for adapter in opened.values()]
    result = opened[plan.leading].provenance
    if len({one.base_hash for one in told}) > 1:
        result = replace(result, base_hash=None, base_name=None)
    principals = {_principal_hash(adapter) for adapter in opened.values()}
    # weighted or summed it is no longer what a residual lacks
    fits = plan.untouched and len(principals) == 1 and any(one.principal_hash for one in told)
    result = replace(result, principal_hash=principals.pop() if fits else None)
    if role is Role.LORA:
        result = replace(result, principal_hash=None)
    return result


def _principal_hash(adapter: Adapter | TunedAdapter) -> str | None:
    """The principal that an adapter was trained from; an untouched one is its own."""
    told = adapter.provenance
    if AdapterKind.of(adapter) is AdapterKind.PRINCIPAL:
        assert isinstance(adapter, Adapter)
        return adapter_hash(adapter)
    return told.principal_hash


def slices_metadata(slices: Sequence[Slice]) -> dict[str, str]:
    """The metadata entry that says what was put together."""
    told = [{"file": piece.path.name, "trait": piece.trait, "weight": piece.weight} for piece in slices]
    return {SLICES_KEY: json.dumps(told)}
