"""Base + adapters as a model that exists tensor by tensor, computed when a tensor is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectune.errors import InputError, some_of
from spectune.factor.matrix import absolute, change, product
from spectune.factor.rounding import check_dtype, check_finite, rounded
from spectune.rebuild.pairing import BASE_DTYPES_KEY, check_goes_on, check_residual_pair, read_base_dtypes
from spectune.weights.adapter import Adapter, Delta, LowRank, TunedAdapter
from spectune.weights.catalogue import Layer, build_catalogue
from spectune.weights.provenance import (
    MODELSPEC_PREDICTION_KEY,
    PREFIX,
    Provenance,
    Role,
    modelspec_metadata,
    spectune_version,
)
from spectune.weights.reader import TensorInfo, WeightSource

Strengths = Sequence[tuple[Adapter | TunedAdapter, float]]
Change = Callable[[str], Tensor]  # layer name -> what is added to its weight, float32

_TOO_LARGE = "rebuild in bfloat16 or float32, or lower the strength"
_DIVERGED = "if the training diverged, rebuild an earlier step"


@dataclass(frozen=True)
class Merged:
    """A source whose tensors are W + sum of changes, each computed in float32 and rounded once.

    Tensors that no adapter changes come byte for byte from the base.
    """

    base: WeightSource
    changes: Mapping[str, tuple[tuple[Layer, Change], ...]]  # tensor name -> what is added to which rows
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    label: str

    def load(self, name: str) -> Tensor:
        """The merged tensor; raises InputError if a change is not finite, misfits or overflows the type."""
        stored = self.base.load(name)
        dtype = self.tensors[name].dtype
        amounts = [(layer, self._amount(layer, of)) for layer, of in self.changes.get(name, ())]
        amounts = [(layer, amount) for layer, amount in amounts if amount.any()]
        if not amounts and dtype == stored.dtype:
            return stored
        result = stored.to(torch.float32, copy=True)
        for layer, amount in amounts:
            result[layer.row_slice] = add(result[layer.row_slice], amount)
        return rounded(result, dtype, f"{name} of {self.label}", hint=_TOO_LARGE)

    def _amount(self, layer: Layer, of: Change) -> Tensor:
        amount = of(layer.name)
        if tuple(amount.shape) != layer.shape:
            raise InputError(
                f"layer {layer.name} of {self.base.label} has shape {layer.shape}, "
                f"the adapter is made for {tuple(amount.shape)}",
                hint="the adapter belongs to a model of another size",
            )
        check_finite(amount, f"the change of {layer.name}", hint=_DIVERGED)
        return amount


def merged(base: WeightSource, adapters: Strengths, *, dtype: torch.dtype | None = None) -> Merged:
    """The model W + strength * change for every adapter, tensor by tensor.

    Changed tensors have the base's type, or the one that a float32 residual records for the original, or
    `dtype`. Raises PairingError when roles exclude each other, InputError for layers the base does not have.
    """
    for adapter, strength in adapters:
        if not math.isfinite(strength):
            raise InputError(f"the strength of {adapter.label} is {strength}: expected a finite number")
        check_goes_on(base, adapter)
    if Provenance.from_metadata(base.metadata).role is Role.RESIDUAL:
        # a residual becomes the model again by its one principal, at full strength
        pair = [adapter for adapter, strength in adapters if strength == 1.0]
        if len(adapters) != 1 or len(pair) != 1:
            raise InputError(
                f"{base.label} is a residual: expected its principal alone at strength 1, "
                f"got {len(adapters)} at {', '.join(f'{strength:g}' for _, strength in adapters)}",
                hint="rebuild the model first, then add other adapters to it",
            )
        return restored(base, pair[0], dtype=dtype)
    parts = [(adapter.layers, _scaled(adapter, strength)) for adapter, strength in adapters if strength]
    return _merged(base, parts, [adapter for adapter, _ in adapters], dtype)


def restored(
    residual: WeightSource, adapter: Adapter | TunedAdapter, *, dtype: torch.dtype | None = None
) -> Merged:
    """The model that `residual` and its principal, or a tuned form of that principal, make together.

    Raises PairingError naming both hashes when the two do not belong together.
    """
    check_residual_pair(residual, adapter)
    return _merged(residual, [(adapter.layers, _whole(adapter))], [adapter], dtype)


def add(weight: Tensor, amount: Tensor) -> Tensor:
    """weight + amount in float32; where the amount is zero every bit of the weight stays, as -0 + 0 is +0."""
    return torch.where(amount == 0, weight, weight + amount)


def _scaled(adapter: Adapter | TunedAdapter, strength: float) -> Change:
    def of(name: str) -> Tensor:
        amount = change(adapter.layers[name])
        return amount if strength == 1.0 else amount * strength

    return of


def _whole(adapter: Adapter | TunedAdapter) -> Change:
    """What stands beside the residual: the principal, or the tuned factors themselves."""

    def of(name: str) -> Tensor:
        layer: LowRank | Delta = adapter.layers[name]
        return product(absolute(layer) if isinstance(layer, Delta) else layer)

    return of


def _merged(
    base: WeightSource,
    parts: Sequence[tuple[Mapping[str, LowRank] | Mapping[str, Delta], Change]],
    adapters: Sequence[Adapter | TunedAdapter],
    dtype: torch.dtype | None,
) -> Merged:
    catalogue = build_catalogue(base, all_layers=True)
    label = " + ".join([base.label, *(adapter.label for adapter in adapters)])
    changes: dict[str, tuple[tuple[Layer, Change], ...]] = {}
    for layers, of in parts:
        unknown = [name for name in layers if name not in catalogue.by_name]
        if unknown:
            raise InputError(
                f"{len(unknown)} of {len(layers)} layers are not in {base.label}: {some_of(unknown)}",
                hint="the adapter belongs to another model",
            )
        for name in layers:
            layer = catalogue.by_name[name]
            check_dtype(base.tensors[layer.tensor].dtype, f"layer {name} of {base.label}")
            changes[layer.tensor] = (*changes.get(layer.tensor, ()), (layer, of))
    original = read_base_dtypes(base)
    tensors = {
        name: replace(info, dtype=dtype or original.get(name, info.dtype)) if name in changes else info
        for name, info in base.tensors.items()
    }
    metadata = _model_metadata(base, adapters)
    return Merged(base=base, changes=changes, metadata=metadata, tensors=tensors, label=label)


def _model_metadata(base: WeightSource, adapters: Sequence[Adapter | TunedAdapter]) -> dict[str, str]:
    """Metadata of a whole model: the base's, with the objective that an adapter was trained for."""
    provenance = Provenance.from_metadata(base.metadata)
    for adapter in adapters:
        tuned_for = Provenance.from_metadata(adapter.metadata)
        if tuned_for.prediction is not None:
            provenance = replace(provenance, prediction=tuned_for.prediction, flow_shift=tuned_for.flow_shift)
        if tuned_for.vae_scale is not None:
            provenance = replace(provenance, vae_scale=tuned_for.vae_scale, vae_shift=tuned_for.vae_shift)
    provenance = replace(provenance, role=Role.MODEL, principal_hash=None, version=spectune_version())
    replaced = {f"{PREFIX}{name}" for name in provenance.__dataclass_fields__} | {BASE_DTYPES_KEY}
    if provenance.prediction is not None:
        replaced.add(MODELSPEC_PREDICTION_KEY)
    kept = {key: value for key, value in base.metadata.items() if key not in replaced}
    return kept | provenance.to_metadata() | modelspec_metadata(provenance.prediction)
