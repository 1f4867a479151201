"""What a file is and what a rank costs, from its header alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spectune.errors import InputError
from spectune.weights.catalogue import Catalogue, Part, build_catalogue
from spectune.weights.layout import TE1_SHORT_ROOT, TE2_ROOT, UNET_ROOT, VAE_ROOT, Layout, infer_layout
from spectune.weights.provenance import Provenance, Role, declared_prediction
from spectune.weights.reader import DTYPE_NAMES, WeightSource

RANKS = (16, 32, 64, 128, 256)
_PARTS: Mapping[str, str] = {"unet": UNET_ROOT, "te1": TE1_SHORT_ROOT, "te2": TE2_ROOT, "vae": VAE_ROOT}


@dataclass(frozen=True)
class PartSummary:
    """One part of a checkpoint."""

    name: str  # unet, te1, te2, vae, other
    tensors: int
    parameters: int
    nbytes: int
    dtypes: tuple[str, ...]  # the most frequent first
    layers: int  # that can be factored by default


@dataclass(frozen=True)
class RankCost:
    """What a principal of one rank takes."""

    rank: int
    parameters: int
    file_bytes: int  # factors in 16 bits
    training_bytes: int  # deltas, gradients and two AdamW moments in float32 beside 16-bit factors


@dataclass(frozen=True)
class ModelSummary:
    """A checkpoint, as far as its header tells."""

    label: str
    role: str
    prediction: str
    declared: bool  # whether the file itself says what it predicts
    provenance: Provenance
    layout: Layout
    parts: tuple[PartSummary, ...]
    ranks: tuple[RankCost, ...]


@dataclass(frozen=True)
class AdapterSummary:
    """An adapter, as far as its header tells."""

    label: str
    role: str
    provenance: Provenance
    layers: Mapping[str, int]  # by part
    ranks: Mapping[int, int]  # how many layers have a rank
    parameters: int
    nbytes: int
    dtypes: tuple[str, ...]


def is_adapter(source: WeightSource) -> bool:
    """Whether the file holds low-rank factors and not a model."""
    return any(name.startswith("lora_") for name in source.tensors)


def describe_model(source: WeightSource, ranks: Sequence[int] = RANKS) -> ModelSummary:
    """Parts, layers and costs of a checkpoint; raises InputError when it is no SDXL."""
    provenance = Provenance.from_metadata(source.metadata)
    catalogue = build_catalogue(source)
    prediction = declared_prediction(source)
    return ModelSummary(
        label=source.label,
        role=str(provenance.role or Role.MODEL),
        prediction=prediction or "eps",
        declared=prediction is not None,
        provenance=provenance,
        layout=infer_layout(source),
        parts=tuple(_part(name, source, catalogue) for name in (*_PARTS, "other")),
        ranks=tuple(rank_cost(catalogue, rank) for rank in ranks),
    )


def describe_adapter(source: WeightSource) -> AdapterSummary:
    """Layers and ranks of an adapter; raises InputError when the file holds none."""
    downs = [
        info
        for name, info in source.tensors.items()
        if name.endswith(("lora_down.weight", "frame_down.weight"))
    ]
    if not downs:
        raise InputError(
            f"{source.label} holds no kohya adapter",
            hint="keys like lora_unet_..._proj_in.lora_down.weight are expected",
        )
    provenance = Provenance.from_metadata(source.metadata)
    parts = Counter(str(part) for info in downs for part in Part if info.name.startswith(f"lora_{part}_"))
    return AdapterSummary(
        label=source.label,
        role=str(provenance.role or Role.LORA),
        provenance=provenance,
        layers=dict(parts),
        ranks=dict(sorted(Counter(info.shape[0] for info in downs).items())),
        parameters=sum(info.numel for info in source.tensors.values() if not info.name.endswith(".alpha")),
        nbytes=sum(info.nbytes for info in source.tensors.values()),
        dtypes=_dtypes(source, [n for n in source.tensors if not n.endswith(".alpha")]),
    )


def rank_cost(catalogue: Catalogue, rank: int) -> RankCost:
    """Parameters and bytes of a principal of `rank`; a layer smaller than that keeps its full rank."""
    parameters = sum(
        min(rank, layer.full_rank) * (layer.in_features + layer.out_features) for layer in catalogue.layers
    )
    return RankCost(rank, parameters, file_bytes=2 * parameters, training_bytes=(2 + 4 * 4) * parameters)


def _part(name: str, source: WeightSource, catalogue: Catalogue) -> PartSummary:
    names = [tensor for tensor in source.tensors if _part_of(tensor) == name]
    infos = [source.tensors[tensor] for tensor in names]
    return PartSummary(
        name=name,
        tensors=len(infos),
        parameters=sum(info.numel for info in infos),
        nbytes=sum(info.nbytes for info in infos),
        dtypes=_dtypes(source, names),
        layers=sum(layer.part.value == name for layer in catalogue.layers),
    )


def _part_of(tensor: str) -> str:
    return next((name for name, root in _PARTS.items() if tensor.startswith(root)), "other")


def _dtypes(source: WeightSource, names: Sequence[str]) -> tuple[str, ...]:
    counted = Counter(DTYPE_NAMES[source.tensors[name].dtype] for name in names)
    return tuple(dtype for dtype, _ in counted.most_common())
