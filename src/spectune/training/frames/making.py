"""Compute the frames of a recipe from the weights of its layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spectune.core.frames import (
    minor_frame,
    normalized,
    plain_frame,
    principal_frame,
    rank_stabilized,
    svd_down_frame,
)
from spectune.core.low_rank import LowRank
from spectune.core.rank import FixedRank
from spectune.files.source import WeightSource
from spectune.files.weights_hash import WeightsHasher
from spectune.sdxl.layers import Catalogue, Layer, layer_weight
from spectune.sdxl.selection import select_layers
from spectune.training.processes.sharing import shared
from spectune.training.recipe.sections.model import ModelSection
from spectune.training.seeds import derived_generator

_OF_WEIGHTS = {"principal": principal_frame, "minor": minor_frame, "svd-down": svd_down_frame}


def make_frames(
    base: WeightSource, catalogue: Catalogue, section: ModelSection, seed: int
) -> dict[str, LowRank]:
    """Compute the frames of the chosen layers from the base. The processes of a run divide the layers."""
    layers = [
        layer for layer in select_layers(catalogue, section.layers) if layer.part.value in section.parts
    ]

    def make(layer: Layer) -> LowRank:
        generator = derived_generator(seed, "frame", layer.name)
        return make_frame(layer_weight(base, layer), layer.name, section, generator)

    return {layer.name: frame for layer, frame in zip(layers, shared(layers, make), strict=True)}


def make_frame(weight: Tensor, name: str, section: ModelSection, generator: torch.Generator) -> LowRank:
    """Compute the frame of a layer on the device of its weight; `generator` is for plain frames."""
    assert section.frame_rank is not None
    shape = tuple(weight.shape)
    rank = FixedRank(section.frame_rank, section.conv_rank).requested(shape)
    if section.uses_weights:
        frame = _OF_WEIGHTS[section.frame](weight, rank=rank, name=name)
    else:
        frame = plain_frame(shape, rank=rank, generator=generator)
    if section.frame_norm is not None:
        frame = normalized(frame, section.frame_norm)
    return rank_stabilized(frame) if section.scaling == "rank_stabilized" else frame


def hash_of_frames(frames: Mapping[str, LowRank]) -> str:
    """Return a hash of frames."""
    hasher = WeightsHasher()
    for name, frame in frames.items():
        hasher.add(f"{name}.down", frame.down.cpu())
        hasher.add(f"{name}.up", frame.up.cpu())
        hasher.add(f"{name}.alpha", torch.tensor(frame.alpha))
    return hasher.hexdigest()
