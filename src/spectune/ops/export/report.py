"""What an export wrote, and what it lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spectune.core.lora import ExportedLayer, total_error


@dataclass(frozen=True)
class PartLoss:
    """The layers of one part: how many, their ranks, and the relative error of their change together."""

    part: str
    layers: int
    lowest_rank: int
    highest_rank: int
    truncated: int  # layers of which directions were cut off
    error: float


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote, with the loss of each layer."""

    path: Path
    hash: str
    layers: tuple[ExportedLayer, ...]
    left_out: tuple[ExportedLayer, ...] = ()  # layers of which nothing is in the file: no change, or no room
    outside: Mapping[str, float] | None = None  # of two checkpoints: tensors that no LoRA holds -> |change|
    warnings: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """Relative error of the change of all layers together, those that are left out among them."""
        return total_error((*self.layers, *self.left_out))

    @property
    def worst(self) -> ExportedLayer:
        return max((*self.layers, *self.left_out), key=lambda layer: layer.error)

    @property
    def parts(self) -> tuple[PartLoss, ...]:
        """The loss part by part, in the order of the file; what is left out counts as lost."""
        layers = (*self.layers, *(layer for layer in self.left_out if layer.norm))
        return tuple(
            _part_loss(part, [layer for layer in layers if layer.part == part])
            for part in dict.fromkeys(layer.part for layer in layers)
        )

    @property
    def unchanged(self) -> tuple[str, ...]:
        """Layers that the adapter or the tuned model does not change."""
        return tuple(layer.name for layer in self.left_out if not layer.norm)

    @property
    def lost(self) -> tuple[str, ...]:
        """Layers whose change did not find room."""
        return tuple(layer.name for layer in self.left_out if layer.norm)

    @property
    def outside_share(self) -> float:
        """The share of the squared norm of all changes that lies in tensors which no LoRA holds, 0..1."""
        missed = sum(norm**2 for norm in (self.outside or {}).values())
        total = missed + sum(layer.norm**2 for layer in (*self.layers, *self.left_out))
        return missed / total if total else 0.0


def _part_loss(part: str, layers: Sequence[ExportedLayer]) -> PartLoss:
    ranks = [layer.rank for layer in layers]
    truncated = sum(layer.truncated for layer in layers)
    return PartLoss(part, len(layers), min(ranks), max(ranks), truncated, total_error(layers))
