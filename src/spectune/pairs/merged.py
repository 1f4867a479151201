"""Base + adapters as a model that exists tensor by tensor, computed when a tensor is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from spectune.adapters.adapter import Adapter, TunedAdapter
from spectune.core.delta import added_to_base, added_to_residual
from spectune.core.linalg import largest_magnitude
from spectune.core.low_rank import LowRank, Product, product, to_matrix, weight_shape
from spectune.core.residual import add_principal
from spectune.core.rounding import check_dtype, check_finite, rounded
from spectune.errors import InputError, some_of
from spectune.files.provenance import (
    MODELSPEC_PREDICTION_KEY,
    PREFIX,
    V_KEY,
    ZERO_SNR_KEY,
    HasProvenance,
    Provenance,
    Role,
    modelspec_metadata,
    spectune_version,
)
from spectune.files.source import TensorInfo, WeightSource
from spectune.pairs.exceptions import is_exceptions, read_exceptions
from spectune.pairs.replaced import Replacement, check_none_replaced, replacements
from spectune.pairs.rules import (
    BASE_DTYPES_KEY,
    check_goes_on,
    check_residual_pair,
    lacks_frame,
    read_base_dtypes,
)
from spectune.pairs.strength import Strength, strength_of
from spectune.sdxl.layers import Layer, build_catalogue
from spectune.sdxl.layout import UNET_ROOT

Strengths = Sequence[tuple[Adapter | TunedAdapter, float | Strength]]
Change = Callable[[str], LowRank]  # layer name -> what is added to its weight

_ENCODERS = "conditioner."
_TOO_LARGE = "rebuild in bfloat16 or float32, or lower the strength"
_DIVERGED = "if the training diverged, rebuild an earlier step"


@dataclass(frozen=True)
class Merged(HasProvenance):
    """A source whose tensors are W + sum of changes, each computed in float32 and rounded once.

    W is the base's tensor, or what stands in for it. Tensors that no adapter changes come byte for byte from
    the base.
    """

    base: WeightSource
    changes: Mapping[str, tuple[tuple[Layer, Change], ...]]  # tensor name -> what is added to which rows
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    label: str
    warnings: tuple[str, ...] = ()
    replaced: Mapping[str, Replacement] = field(default_factory=dict[str, Replacement])

    def over(self, base: WeightSource) -> Merged:
        """The same with the tensors of the base read through another source."""
        return replace(self, base=base)

    def load(self, name: str) -> Tensor:
        """The merged tensor; raises InputError if a change is not finite, misfits or overflows the type."""
        if name not in self.base.tensors:
            return _marker(name)
        stored = self.base.load(name)
        dtype = self.tensors[name].dtype
        changes, replacement = self.changes.get(name, ()), self.replaced.get(name)
        if replacement is not None:
            result = replacement.over(stored)
        elif changes:
            result = stored.to(torch.float32, copy=True)
        else:
            return stored if dtype == stored.dtype else self._rounded(stored.float(), dtype, name)
        changed = [self._add(result[layer.row_slice], layer, of(layer.name)) for layer, of in changes]
        if replacement is None and not any(changed) and dtype == stored.dtype:
            return stored
        return self._rounded(result, dtype, name)

    def _add(self, weight: Tensor, layer: Layer, low_rank: LowRank) -> bool:
        """Add a product to a weight in float32, in place; whether there was anything to add."""
        check_fits(layer, low_rank, self.base.label)
        matrix, changed = to_matrix(weight), False
        for tile, amount in Product(low_rank).tiles():
            largest = largest_magnitude(amount)
            if largest == 0:
                continue
            if not largest < math.inf:
                check_finite(product(low_rank), f"the change of {layer.name}", hint=_DIVERGED)
            matrix[tile] = add(matrix[tile], amount)
            changed = True
        return changed

    def _rounded(self, exact: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        return rounded(exact, dtype, f"{name} of {self.label}", hint=_TOO_LARGE)


@dataclass(frozen=True)
class Restored(HasProvenance):
    """A source whose tensors are residual + principal: the original, or what training made of it."""

    residual: WeightSource
    principals: Mapping[str, tuple[tuple[Layer, Change], ...]]  # tensor name -> what is added to which rows
    untouched: bool  # the principal is the one that was taken out, so what it cannot give back is known
    original: Mapping[str, torch.dtype]  # types of tensors that the residual stores in another one
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    label: str
    warnings: tuple[str, ...] = ()

    def load(self, name: str) -> Tensor:
        """The restored tensor; raises InputError if a factor is not finite, misfits or overflows the type."""
        if name not in self.residual.tensors:
            return _marker(name)
        stored = self.residual.load(name)
        principals = self.principals.get(name, ())
        dtype = self.tensors[name].dtype
        if not principals:
            label = f"{name} of {self.label}"
            return stored if dtype == stored.dtype else rounded(stored.float(), dtype, label, hint=_TOO_LARGE)
        fused = any(layer.rows is not None for layer, _ in principals)
        result = stored.to(dtype, copy=True) if fused else None
        for layer, of in principals:
            low_rank = of(layer.name)
            check_fits(layer, low_rank, self.residual.label)
            rows = stored[layer.row_slice]
            part = add_principal(rows, low_rank, dtype, name=f"{name} of {self.label}", hint=_DIVERGED)
            if result is None:
                result = part
            else:
                result[layer.row_slice] = part
        assert result is not None
        exceptions = (
            read_exceptions(self.residual, name, self.original.get(name, stored.dtype))
            if self.untouched
            else None
        )
        if exceptions is not None:
            result.view(-1)[exceptions.index] = exceptions.values.to(dtype)
        return result


def check_fits(layer: Layer, low_rank: LowRank, label: str) -> None:
    """Raise InputError when factors stand for a weight of another shape than the layer's."""
    if weight_shape(low_rank) != layer.shape:
        raise InputError(
            f"layer {layer.name} of {label} has shape {layer.shape}, "
            f"the adapter is made for {weight_shape(low_rank)}",
            hint="the adapter belongs to a model of another size",
        )


def merged(
    base: WeightSource,
    adapters: Strengths,
    *,
    dtype: torch.dtype | None = None,
    cast_all: bool = False,
) -> Merged | Restored:
    """The model W + strength * change for every adapter, tensor by tensor.

    Changed tensors have the base's type, or the one that a float32 residual records for the original, or
    `dtype`; with `cast_all` so have the others of the UNet and the encoders. Raises PairingError when roles
    exclude each other, InputError for layers the base does not have.
    """
    counted = [(adapter, strength_of(strength)) for adapter, strength in adapters]
    said = tuple(
        check_goes_on(base, adapter, strengthens=max(strength.by_part.values()) > 0)
        for adapter, strength in counted
    )
    if base.provenance.role is Role.RESIDUAL:
        # a residual becomes the model again by its one principal, at full strength
        if len(counted) != 1 or not counted[0][1].whole:
            raise InputError(
                f"{base.label} is a residual: expected its principal alone at strength 1, "
                f"got {len(counted)} at {'; '.join(str(strength) for _, strength in counted)}",
                hint="rebuild the model first, then add other adapters to it",
            )
        model: Merged | Restored = restored(base, counted[0][0], dtype=dtype)
    else:
        model = _merged(
            base,
            [(_strong(adapter, strength), _change(base, adapter, strength)) for adapter, strength in counted],
            [adapter for adapter, _ in counted],
            replacements(base, counted),
            dtype,
        )
    if cast_all and dtype is not None:
        model = replace(model, tensors=_all_cast(model.tensors, dtype))
    return replace(model, warnings=tuple(filter(None, said)))


def restored(
    residual: WeightSource, adapter: Adapter | TunedAdapter, *, dtype: torch.dtype | None = None
) -> Restored:
    """The model that `residual` and its principal, or a tuned form of that principal, make together.

    Raises PairingError naming both hashes when the two do not belong together.
    """
    check_none_replaced(residual, adapter)
    untouched = check_residual_pair(residual, adapter)
    principals = _by_tensor(residual, [(list(adapter.layers), _whole(adapter))])
    original = read_base_dtypes(residual)
    infos = {name: info for name, info in residual.tensors.items() if not is_exceptions(name)}
    infos = _marked(infos, residual, [adapter])
    return Restored(
        residual=residual,
        principals=principals,
        untouched=untouched,
        original=original,
        metadata=_model_metadata(residual, [adapter]),
        tensors=_typed(infos, principals, original, dtype),
        label=f"{residual.label} + {adapter.label}",
    )


def add(weight: Tensor, amount: Tensor) -> Tensor:
    """weight + amount in float32; where the amount is zero every bit of the weight stays, as -0 + 0 is +0."""
    return torch.where(amount == 0, weight, weight + amount)


def _change(base: WeightSource, adapter: Adapter | TunedAdapter, strength: Strength) -> Change:
    """What an adapter adds to a base: its change, or all of the factors where the base lacks the frame."""
    if not lacks_frame(base, adapter):
        return _scaled(adapter, strength)
    if not strength.whole:
        raise InputError(
            f"{base.label} is a residual: expected its principal at strength 1, got {strength}",
            hint="rebuild the model first, then add other adapters to it",
        )
    check_none_replaced(base, adapter)
    return _whole(adapter)


def _strong(adapter: Adapter | TunedAdapter, strength: Strength) -> list[str]:
    """The layers in which the adapter counts."""
    return [name for name in adapter.layers if strength.of(name)]


def _scaled(adapter: Adapter | TunedAdapter, strength: Strength) -> Change:
    def of(name: str) -> LowRank:
        low_rank = added_to_base(adapter.layers[name])
        return replace(low_rank, alpha=low_rank.alpha * strength.of(name))

    return of


def _whole(adapter: Adapter | TunedAdapter) -> Change:
    """What stands beside the residual: the principal, or the tuned factors themselves."""
    return lambda name: added_to_residual(adapter.layers[name])


def _merged(
    base: WeightSource,
    parts: Sequence[tuple[Sequence[str], Change]],
    adapters: Sequence[Adapter | TunedAdapter],
    replaced: Mapping[str, Replacement],
    dtype: torch.dtype | None,
) -> Merged:
    changes = _by_tensor(base, parts)
    return Merged(
        base=base,
        changes=changes,
        metadata=_model_metadata(base, adapters),
        tensors=_typed(_marked(base.tensors, base, adapters), {**changes, **replaced}, {}, dtype),
        label=" + ".join([base.label, *(adapter.label for adapter in adapters)]),
        replaced=replaced,
    )


def _by_tensor(
    base: WeightSource, parts: Sequence[tuple[Sequence[str], Change]]
) -> dict[str, tuple[tuple[Layer, Change], ...]]:
    """What is added to which rows of every tensor; raises InputError for layers that the base has not."""
    catalogue = build_catalogue(base, all_layers=True)
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
            check_dtype(base.tensors[layer.tensor].dtype, f"layer {name} of {base.label}", residual=True)
            changes[layer.tensor] = (*changes.get(layer.tensor, ()), (layer, of))
    return changes


def _typed(
    tensors: Mapping[str, TensorInfo],
    changed: Mapping[str, object],
    original: Mapping[str, torch.dtype],
    dtype: torch.dtype | None,
) -> dict[str, TensorInfo]:
    """Changed tensors in `dtype`, else in the type that they had originally."""
    return {
        name: replace(info, dtype=dtype or original.get(name, info.dtype)) if name in changed else info
        for name, info in tensors.items()
    }


def _all_cast(tensors: Mapping[str, TensorInfo], dtype: torch.dtype) -> dict[str, TensorInfo]:
    """All numbers of the UNet and the encoders in `dtype`; an autoencoder needs what it has."""
    return {
        name: replace(info, dtype=dtype)
        if info.dtype.is_floating_point and info.numel and name.startswith((UNET_ROOT, _ENCODERS))
        else info
        for name, info in tensors.items()
    }


def _marked(
    tensors: Mapping[str, TensorInfo], base: WeightSource, adapters: Sequence[Adapter | TunedAdapter]
) -> dict[str, TensorInfo]:
    """The tensors with the markers of what the model predicts, where training has changed that."""
    before = _told(base.metadata)
    after = _told(_model_metadata(base, adapters))
    if after == before or after.prediction is None:
        return dict(tensors)
    wanted = {V_KEY: after.prediction == "v", ZERO_SNR_KEY: after.noise_schedule == "zero_terminal_snr"}
    kept = {name: info for name, info in tensors.items() if wanted.get(name, True)}
    for name, is_wanted in wanted.items():
        if is_wanted and name not in kept:
            kept[name] = TensorInfo(name, _marker(name).dtype, tuple(_marker(name).shape))
    return kept


def _told(metadata: Mapping[str, str]) -> Provenance:
    told = Provenance.from_metadata(metadata)
    return Provenance(prediction=told.prediction, noise_schedule=told.noise_schedule)


def _marker(name: str) -> Tensor:
    """An empty tensor: only its name says something."""
    assert name in (V_KEY, ZERO_SNR_KEY), f"{name} is not in the base"
    return torch.empty(0)


def _model_metadata(base: WeightSource, adapters: Sequence[Adapter | TunedAdapter]) -> dict[str, str]:
    """Metadata of a whole model: the base's, with the objective that an adapter was trained for."""
    provenance = base.provenance
    for adapter in adapters:
        tuned_for = adapter.provenance
        if tuned_for.prediction is not None:
            provenance = replace(
                provenance,
                prediction=tuned_for.prediction,
                flow_shift=tuned_for.flow_shift,
                noise_schedule=tuned_for.noise_schedule,
            )
        told = (tuned_for.vae_scale, tuned_for.vae_shift, tuned_for.vae_padding, tuned_for.vae_name)
        if any(value is not None for value in told):
            provenance = replace(
                provenance,
                vae_scale=tuned_for.vae_scale,
                vae_shift=tuned_for.vae_shift,
                vae_padding=tuned_for.vae_padding,
                vae_name=tuned_for.vae_name,
            )
    provenance = replace(provenance, role=Role.MODEL, principal_hash=None, version=spectune_version())
    replaced = {f"{PREFIX}{name}" for name in provenance.__dataclass_fields__} | {BASE_DTYPES_KEY}
    if provenance.prediction is not None:
        replaced.add(MODELSPEC_PREDICTION_KEY)
    kept = {key: value for key, value in base.metadata.items() if key not in replaced}
    return kept | provenance.to_metadata() | modelspec_metadata(provenance.prediction)
