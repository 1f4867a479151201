"""Cutting layers out of adapter files and putting those of several together."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch

from spectune.errors import InputError, PairingError, some_of
from spectune.rebuilding.export import Exported, ExportedLayer, limited_rank, total_error
from spectune.rebuilding.files.common import catalogue_of, kept_metadata, refuse_overwriting
from spectune.rebuilding.pairing import shown
from spectune.rebuilding.pipeline import Progress, stream, tell
from spectune.rebuilding.slices import Term, summed
from spectune.weights.adapter import Adapter, Delta, LazyLayers, TunedAdapter
from spectune.weights.adapter_keys import Spelling
from spectune.weights.adapter_reader import open_adapter
from spectune.weights.adapter_writer import AdapterWriter, save_tuned
from spectune.weights.alphas import scale_problems
from spectune.weights.catalogue import Catalogue, Layer
from spectune.weights.provenance import PREFIX, Provenance, Role, spectune_version
from spectune.weights.reader import open_checkpoint
from spectune.weights.traits import TraitRule, trait_layers

SLICES_KEY = f"{PREFIX}slices"  # of which files, traits and weights an adapter was put together
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Slice:
    """Layers of one adapter file: those that a trait names, all for None."""

    path: Path
    trait: str | None = None
    weight: float = 1.0

    def __str__(self) -> str:
        trait = "" if self.trait is None else f":{self.trait}"
        return f"{self.path.name}{trait}" + ("" if self.weight == 1 else f" x {self.weight:g}")


def parse_slice(word: str) -> Slice:
    """`FILE`, `FILE:TRAIT`, `FILE:TRAIT:WEIGHT` or `FILE:WEIGHT`; a drive letter's colon is the file's."""
    match = re.fullmatch(r"(.*?\.safetensors)(?::([^:]*))?(?::([^:]*))?", word, re.IGNORECASE)
    if match is None:
        raise InputError(
            f"unreadable slice {word!r}", hint="write it like style.safetensors:te or x.safetensors:unet:0.8"
        )
    path, trait, weight = match[1], match[2] or None, match[3]
    if trait is not None and weight is None and _NUMBER.fullmatch(trait):
        trait, weight = None, trait
    if weight is not None and not _NUMBER.fullmatch(weight):
        raise InputError(f"the weight in {word!r} is {weight!r}: expected a number like 0.8")
    return Slice(Path(path), trait, 1.0 if weight is None else float(weight))


@dataclass(frozen=True)
class SliceResult:
    """What one slice took and what of its file stayed behind; layers by name."""

    slice: Slice
    kept: tuple[str, ...]
    removed: tuple[str, ...]


@dataclass(frozen=True)
class SliceReport:
    """What `slice` wrote."""

    path: Path
    hash: str
    role: Role  # lora, tuned or principal
    slices: tuple[SliceResult, ...]
    layers: tuple[ExportedLayer, ...]  # with what rounding cost; none for tuned
    overlaps: tuple[str, ...]  # layers that are sums
    warnings: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """Relative error of all layers together."""
        return total_error(self.layers)


def slice_adapters(
    slices: Sequence[Slice],
    out: Path,
    *,
    traits: Mapping[str, TraitRule] | None = None,
    base: Path | None = None,
    store: torch.dtype | None = None,
    spelling: Spelling = Spelling.KOHYA,
    overlap: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> SliceReport:
    """Put layers of one or several adapters into a new one.

    A layer that several slices have is the exact sum of them, or with `overlap` off an InputError. Weights
    count once; alphas stay. Tuned adapters of one model give a tuned adapter where every layer comes from one
    of them at weight 1, otherwise, and beside LoRAs, a LoRA. `store` is the type of the factors: by default
    that of the files, float16 for what comes from tuned adapters. `base` is the model, where it is not of
    SDXL's size. Progress counts layers. Raises PairingError for files that no single adapter can hold.
    """
    with ExitStack() as stack:
        catalogue = None if base is None else catalogue_of(base, out)
        opened: dict[Path, Adapter | TunedAdapter] = {}
        for piece in slices:
            if piece.path not in opened:
                opened[piece.path] = stack.enter_context(open_adapter(piece.path, catalogue))
        refuse_overwriting(out, list(opened.values()))
        plan = _Plan.of(slices, opened, traits or {})
        if plan.overlaps and not overlap:
            raise InputError(
                f"{len(plan.overlaps)} layers are in more than one slice: {some_of(plan.overlaps)}",
                hint="leave out --no-overlap to add them up, or narrow the traits",
            )
        role, warnings = _role(plan, opened)
        provenance = replace(_provenance(plan, opened, role), role=role, version=spectune_version())
        kept = kept_metadata(opened[slices[0].path].metadata, one_file=len(opened) == 1)
        metadata = {**kept, SLICES_KEY: _told(slices)}
        warnings = (*(text for adapter in opened.values() for text in adapter.warnings), *warnings)
        if role is Role.TUNED:
            written = _write_tuned(plan, opened, out, provenance, metadata, force=force)
            reports: list[ExportedLayer] = []
        else:
            written, reports = _write(
                plan, opened, out, provenance, metadata, store, spelling, force=force, progress=progress
            )
            with open_checkpoint(out) as made:
                warnings = (*warnings, *scale_problems(made))
    return SliceReport(out, written, role, plan.results, tuple(reports), plan.overlaps, warnings)


@dataclass(frozen=True)
class _Plan:
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
    ) -> _Plan:
        found: dict[str, Layer] = {}
        sources: dict[str, tuple[Slice, ...]] = {}
        results: list[SliceResult] = []
        for piece in slices:
            adapter = opened[piece.path]
            catalogue = _own_layers(adapter)
            kept = trait_layers(catalogue, piece.trait, traits)
            for layer in kept:
                first = found.setdefault(layer.name, layer)
                if first.shape != layer.shape:
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


def _role(plan: _Plan, opened: Mapping[Path, Adapter | TunedAdapter]) -> tuple[Role, tuple[str, ...]]:
    """What the new file is, and what is to be said about it."""
    told = {path: Provenance.from_metadata(adapter.metadata) for path, adapter in opened.items()}
    principals = [path for path in opened if told[path].role is Role.PRINCIPAL]
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
    return ", ".join(shown(base) for base in sorted(bases))


def _provenance(plan: _Plan, opened: Mapping[Path, Adapter | TunedAdapter], role: Role) -> Provenance:
    """What the new file says: where it comes from if all agree, what it predicts as the UNet's layers do."""
    told = [Provenance.from_metadata(adapter.metadata) for adapter in opened.values()]
    counted = Counter(
        piece.path for name, pieces in plan.sources.items() if name.startswith("unet.") for piece in pieces
    )
    leading = counted.most_common(1)[0][0] if counted else plan.results[0].slice.path
    result = Provenance.from_metadata(opened[leading].metadata)
    if len({one.base_hash for one in told}) > 1:
        result = replace(result, base_hash=None, base_name=None)
    if len({one.principal_hash for one in told}) > 1:
        result = replace(result, principal_hash=None)
    if role is Role.LORA:
        result = replace(result, principal_hash=None)
    return result


def _told(slices: Sequence[Slice]) -> str:
    return json.dumps(
        [{"file": piece.path.name, "trait": piece.trait, "weight": piece.weight} for piece in slices]
    )


def _write_tuned(
    plan: _Plan,
    opened: Mapping[Path, Adapter | TunedAdapter],
    out: Path,
    provenance: Provenance,
    metadata: Mapping[str, str],
    *,
    force: bool,
) -> str:
    adapters = {layer.name: opened[plan.sources[layer.name][0].path] for layer in plan.layers}
    ranks = {name: adapter.rank(name) for name, adapter in adapters.items()}

    def read(name: str) -> Delta:
        delta = adapters[name].layers[name]
        assert isinstance(delta, Delta)
        return delta

    dtypes = dict.fromkeys(ranks, torch.float32)
    tuned = TunedAdapter(LazyLayers(ranks, dtypes, read), metadata, out.name)
    return save_tuned(out, tuned, provenance, metadata=metadata, force=force)


def _write(
    plan: _Plan,
    opened: Mapping[Path, Adapter | TunedAdapter],
    out: Path,
    provenance: Provenance,
    metadata: Mapping[str, str],
    store: torch.dtype | None,
    spelling: Spelling,
    *,
    force: bool,
    progress: Progress | None,
) -> tuple[str, list[ExportedLayer]]:
    ranks = {layer.name: _rank(layer, plan, opened) for layer in plan.layers}
    dtypes = {layer.name: store or _dtype(layer, plan, opened) for layer in plan.layers}
    reports: list[ExportedLayer] = []
    with AdapterWriter(
        out, plan.layers, ranks, dtype=dtypes, provenance=provenance, spelling=spelling,
        metadata=metadata, force=force,
    ) as writer:  # fmt: skip

        def work(layer: Layer) -> Exported:
            pieces = plan.sources[layer.name]
            terms = [Term(opened[piece.path].layers[layer.name], piece.weight) for piece in pieces]
            return summed(terms, dtypes[layer.name], layer.name, even=spelling is Spelling.DIFFUSERS)

        def take(layer: Layer, result: Exported) -> None:
            tell(progress, len(reports), len(plan.layers), layer.name)
            writer.write(layer, result.low_rank)
            reports.append(result.report)

        stream(plan.layers, work, take, size=lambda layer: ranks[layer.name] * _side(layer) * 16)
        tell(progress, len(reports), len(plan.layers), "")
    return writer.hash, reports


def _side(layer: Layer) -> int:
    return layer.in_features + layer.out_features


def _rank(layer: Layer, plan: _Plan, opened: Mapping[Path, Adapter | TunedAdapter]) -> int:
    adapters = [opened[piece.path] for piece in plan.sources[layer.name]]
    terms = sum(
        adapter.rank(layer.name) * (2 if isinstance(adapter, TunedAdapter) else 1) for adapter in adapters
    )
    # a layer that is not summed keeps even a rank above its own size
    return terms if len(adapters) == 1 and isinstance(adapters[0], Adapter) else limited_rank(
        layer.shape, terms, None
    )  # fmt: skip


def _dtype(layer: Layer, plan: _Plan, opened: Mapping[Path, Adapter | TunedAdapter]) -> torch.dtype:
    """The type that holds the factors of all files: theirs, float16 for deltas, which are re-factored."""
    adapters = [opened[piece.path] for piece in plan.sources[layer.name]]
    found = [
        torch.float16 if isinstance(adapter, TunedAdapter) else adapter.dtype(layer.name)
        for adapter in adapters
    ]
    return reduce(torch.promote_types, found)
