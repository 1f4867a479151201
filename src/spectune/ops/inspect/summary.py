"""Summarize a file and the cost of a rank, from its header only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from spectune.adapters.adapter import ALPHA, DOWN, FRAME_DOWN, REPLACED
from spectune.adapters.alphas import alpha_problems, read_alphas, scale_problems
from spectune.adapters.loading import Loading, loading_table
from spectune.adapters.reader import is_general
from spectune.adapters.spellings import adapter_part, factor_of, spelling_of
from spectune.checkpoints.ema import ema_names
from spectune.errors import InputError
from spectune.files.dtypes import SAFETENSORS_NAMES
from spectune.files.provenance import Provenance, Role
from spectune.files.source import WeightSource, declared_prediction
from spectune.ops.inspect.other_kinds import count_kinds
from spectune.sdxl.inference import infer_parts
from spectune.sdxl.layers import RANKS, Catalogue, RankCost, build_catalogue, rank_cost
from spectune.sdxl.layout import PART_ROOTS, PartLayouts, part_of
from spectune.sdxl.prediction_type import edm_markers


@dataclass(frozen=True)
class PartSummary:
    """One part of a checkpoint."""

    name: str  # unet, te1, te2, vae, other
    tensors: int
    parameters: int
    nbytes: int
    dtypes: tuple[str, ...]  # most frequent first
    layers: int  # layers that are factored by default


@dataclass(frozen=True)
class ModelSummary:
    """The content of a checkpoint, from its header."""

    label: str
    role: str
    prediction: str
    declared: bool  # whether the file declares its prediction type
    provenance: Provenance
    layout: PartLayouts
    parts: tuple[PartSummary, ...]
    ranks: tuple[RankCost, ...]
    programs: tuple[Loading, ...]  # what each program loads from it, saved as a single file
    ema: int = 0  # tensors of the UNet that also have a moving average


@dataclass(frozen=True)
class AdapterSummary:
    """The content of an adapter, from its header."""

    label: str
    role: str
    spelling: str  # kohya, diffusers, comfyui
    provenance: Provenance
    layers: Mapping[str, int]  # part -> layers
    ranks: Mapping[int, int]  # rank -> layers
    scales: Mapping[float, int]  # alpha / rank -> layers; empty if the file has no alphas
    parameters: int
    nbytes: int
    dtypes: tuple[str, ...]
    problems: tuple[str, ...]  # with its alphas
    programs: tuple[Loading, ...]  # what each program loads from it, on SDXL
    replaced: int = 0  # complete tensors that replace those of the base; not counted in layers
    replaced_parameters: int = 0
    # kind -> layers, if the file is more than a product of two factors per layer
    kinds: Mapping[str, int] = field(default_factory=dict[str, int])
    ignored: tuple[str, ...] = ()  # keys that change nothing


def describe_model(source: WeightSource, ranks: Sequence[int] = RANKS) -> ModelSummary:
    """Return the parts, layers and costs of a checkpoint. Raises InputError if it is not SDXL."""
    provenance = source.provenance
    catalogue = build_catalogue(source)
    prediction, is_edm = declared_prediction(source), bool(edm_markers(source))
    return ModelSummary(
        label=source.label,
        role=str(provenance.role or Role.MODEL),
        prediction="EDM" if is_edm else prediction or "eps",
        declared=is_edm or prediction is not None,
        provenance=provenance,
        layout=infer_parts(source),
        parts=tuple(_part(name, source, catalogue) for name in (*PART_ROOTS, "other")),
        ranks=tuple(rank_cost(catalogue, rank) for rank in ranks),
        programs=loading_table(source),
        ema=len(ema_names(source.tensors)),
    )


def describe_adapter(source: WeightSource) -> AdapterSummary:
    """Return the layers, ranks and scales of an adapter in any spelling. Raises InputError if it has none."""
    if is_general(source.tensors):
        return _describe_other_kinds(source)
    downs = [
        info
        for name, info in source.tensors.items()
        if factor_of(name) in (DOWN, FRAME_DOWN) and len(info.shape) > 1
    ]
    whole = [info for name, info in source.tensors.items() if name.startswith(REPLACED)]
    if not (downs or whole):
        raise InputError(
            f"{source.label} holds no pairs of low-rank factors: expected keys such as "
            "lora_unet_..._proj_in.lora_down.weight or unet....lora_A.weight",
            hint="pass a LoRA, a principal or a tuned adapter",
        )
    provenance = source.provenance
    parts = Counter(str(adapter_part(info.name) or "other") for info in downs)
    factors = [name for name in source.tensors if factor_of(name) not in (None, ALPHA)]
    alphas = read_alphas(source, all_spellings=True).values()
    scales = Counter(alpha.value / alpha.rank for alpha in alphas if alpha.value and alpha.rank)
    return AdapterSummary(
        label=source.label,
        role=str(provenance.role or Role.LORA),
        spelling=" and ".join(sorted({spelling_of(info.name) for info in downs})),
        provenance=provenance,
        layers=dict(parts),
        ranks=dict(sorted(Counter(info.shape[0] for info in downs).items())),
        scales=dict(scales.most_common()),
        parameters=sum(source.tensors[name].numel for name in factors or source.tensors),
        nbytes=sum(info.nbytes for info in source.tensors.values()),
        dtypes=_dtypes(source, factors or list(source.tensors)),
        problems=(*alpha_problems(source), *scale_problems(source)) if downs else (),
        programs=loading_table(source) if downs else (),
        replaced=len(whole),
        replaced_parameters=sum(info.numel for info in whole),
    )


def _describe_other_kinds(source: WeightSource) -> AdapterSummary:
    found, provenance = count_kinds(source), source.provenance
    alphas = read_alphas(source, all_spellings=True).values()
    return AdapterSummary(
        label=source.label,
        role=str(provenance.role or Role.LORA),
        spelling=" and ".join(sorted({spelling_of(key) for key in found.keys})),
        provenance=provenance,
        layers=found.parts,
        ranks=found.ranks,
        scales=dict(Counter(a.value / a.rank for a in alphas if a.value and a.rank).most_common()),
        parameters=sum(source.tensors[key].numel for key in found.keys),
        nbytes=sum(info.nbytes for info in source.tensors.values()),
        dtypes=_dtypes(source, found.keys),
        problems=(*alpha_problems(source), *scale_problems(source)),
        programs=loading_table(source),
        kinds=found.kinds,
        ignored=found.ignored,
    )


def _part(name: str, source: WeightSource, catalogue: Catalogue) -> PartSummary:
    names = [tensor for tensor in source.tensors if part_of(tensor) == name]
    infos = [source.tensors[tensor] for tensor in names]
    return PartSummary(
        name=name,
        tensors=len(infos),
        parameters=sum(info.numel for info in infos),
        nbytes=sum(info.nbytes for info in infos),
        dtypes=_dtypes(source, names),
        layers=sum(layer.part.value == name for layer in catalogue.layers),
    )


def _dtypes(source: WeightSource, names: Sequence[str]) -> tuple[str, ...]:
    counted = Counter(SAFETENSORS_NAMES[source.tensors[name].dtype] for name in names)
    return tuple(dtype for dtype, _ in counted.most_common())
