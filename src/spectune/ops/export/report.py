"""The result of an export, with its errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spectune.core.lora import ExportedLayer, total_error


@dataclass(frozen=True)
class PartLoss:
    """The layers of one part: count, ranks, and the relative error of their change together."""

    part: str
    layers: int
    lowest_rank: int
    highest_rank: int
    truncated: int  # layers that lost singular directions
    error: float


@dataclass(frozen=True)
class ExportReport:
    """The result of `export`, with the error of each layer."""

    path: Path
    hash: str
    layers: tuple[ExportedLayer, ...]
    left_out: tuple[
        ExportedLayer, ...
    ] = ()  # layers that are not in the file: unchanged, or without room in `size`
    outside: Mapping[str, float] | None = None  # |change| of changed tensors that a LoRA cannot hold
    held: Mapping[int, float] = field(default_factory=dict[int, float])  # rank -> share of the squared change
    warnings: tuple[str, ...] = ()
    card: Path | None = None

    @property
    def error(self) -> float:
        """Return the relative error of the change of all layers together, including those left out."""
        return total_error((*self.layers, *self.left_out))

    @property
    def worst(self) -> ExportedLayer:
        return max((*self.layers, *self.left_out), key=lambda layer: layer.error)

    @property
    def parts(self) -> tuple[PartLoss, ...]:
        """Return the loss of each part, in the order of the file. Layers left out count as lost."""
        layers = (*self.layers, *(layer for layer in self.left_out if layer.norm))
        return tuple(
            _part_loss(part, [layer for layer in layers if layer.part == part])
            for part in dict.fromkeys(layer.part for layer in layers)
        )

    @property
    def unchanged(self) -> tuple[str, ...]:
        """Return the layers that the adapter or the tuned model does not change."""
        return tuple(layer.name for layer in self.left_out if not layer.norm)

    @property
    def lost(self) -> tuple[str, ...]:
        """Return the changed layers that did not fit into the requested size or energy."""
        return tuple(layer.name for layer in self.left_out if layer.norm)

    @property
    def outside_share(self) -> float:
        """Return the share of the squared change in tensors that a LoRA cannot hold, 0..1."""
        missed = sum(norm**2 for norm in (self.outside or {}).values())
        total = missed + sum(layer.norm**2 for layer in (*self.layers, *self.left_out))
        return missed / total if total else 0.0


def _part_loss(part: str, layers: Sequence[ExportedLayer]) -> PartLoss:
    ranks = [layer.rank for layer in layers]
    truncated = sum(layer.truncated for layer in layers)
    return PartLoss(part, len(layers), min(ranks), max(ranks), truncated, total_error(layers))
