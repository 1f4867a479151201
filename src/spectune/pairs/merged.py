"""Lazy models of base + adapters: each tensor is computed when it is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from spectune.adapters.adapter import Adapter, AnyAdapter, GeneralAdapter, TunedAdapter
from spectune.core.delta import added_to_base, added_to_residual
from spectune.core.linalg import largest_magnitude, new_copy
from spectune.core.low_rank import LowRank, Product, product, to_matrix, weight_shape
from spectune.core.residual import add_principal
from spectune.core.rounding import check_dtype, check_finite, rounded
from spectune.errors import InputError, PairingError, some_of
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
from spectune.pairs.differences import Addition, add, additions
from spectune.pairs.replaced import Replacement, check_none_replaced, replacements, rounding_notes
from spectune.pairs.residual_file import (
    BASE_DTYPES_KEY,
    PRINCIPAL_DTYPE_KEY,
    is_exceptions,
    read_base_dtypes,
    read_exceptions,
)
from spectune.pairs.rules import Action, BaseKind, check_residual_pair, pairing
from spectune.pairs.strength import Strength, strength_of
from spectune.pairs.trained_principal import rounded_factors
from spectune.sdxl.layers import Layer, build_catalogue
from spectune.sdxl.layout import UNET_ROOT

Strengths = Sequence[tuple[AnyAdapter, float | Strength]]
Amount = Callable[[Tensor], Tensor]  # float32 weight -> float32 amount to add to it
Change = Callable[[str], LowRank | Amount]  # layer name -> product or amount to add to its weight
Factors = Callable[[str], LowRank]
C = TypeVar("C", Change, Factors)

_ENCODERS = "conditioner."
_TOO_LARGE = "rebuild in bfloat16 or float32, or lower the strength"
_DAMAGED = "the checkpoint is damaged or was saved with overflow: download it again or use its fp32 version"
_DIVERGED = "the training may have diverged: rebuild an earlier step"


@dataclass(frozen=True)
class Merged(HasProvenance):
    """A source with the tensors W + sum of changes, each computed in float32 and rounded once.

    W is a tensor of the base or its replacement. Unchanged tensors equal those of the base byte for byte.
    """

    base: WeightSource
    changes: Mapping[str, tuple[tuple[Layer, Change], ...]]  # tensor name -> changes of its layers
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    label: str
    warnings: tuple[str, ...] = ()
    replaced: Mapping[str, Replacement] = field(default_factory=dict[str, Replacement])
    added: Mapping[str, tuple[Addition, ...]] = field(default_factory=dict[str, tuple[Addition, ...]])

    @property
    def touched(self) -> set[str]:
        """Return the names of the tensors that the adapters can change."""
        return {*self.changes, *self.replaced, *self.added}

    def over(self, base: WeightSource) -> Merged:
        """Return the same model, but read the base through another source."""
        return replace(self, base=base)

    def load(self, name: str) -> Tensor:
        """Return a merged tensor.

        Raises InputError if a change is not finite, does not fit the layer or overflows the dtype.
        """
        if name not in self.base.tensors:
            return _marker(name)
        stored = self.base.load(name)
        dtype = self.tensors[name].dtype
        changes, added = self.changes.get(name, ()), self.added.get(name, ())
        replacement = self.replaced.get(name)
        if replacement is not None:
            result = replacement.over(stored)
            if result.dtype == dtype and not (changes or added):
                return result
            result = result.float()
        elif changes or added:
            result = new_copy(stored, torch.float32)
        else:
            return stored if dtype == stored.dtype else self._rounded(stored.float(), dtype, name)
        changed = [self._add(result[layer.row_slice], layer, of(layer.name)) for layer, of in changes]
        changed += [addition.add_to(result) for addition in added]
        if replacement is None and not any(changed) and dtype == stored.dtype:
            return stored
        check_finite(result, f"{name} of {self.base.label}", hint=_DAMAGED)
        return self._rounded(result, dtype, name)

    def _add(self, weight: Tensor, layer: Layer, change: LowRank | Amount) -> bool:
        """Add a product or amount to a float32 weight in place; return whether it is not zero."""
        if not isinstance(change, LowRank):
            whole = change(weight)
            if largest_magnitude(whole) == 0:
                return False
            check_finite(whole, f"the change of {layer.name}", hint=_DIVERGED)
            weight.copy_(add(weight, whole))
            return True
        return self._add_product(weight, layer, change)

    def _add_product(self, weight: Tensor, layer: Layer, low_rank: LowRank) -> bool:
        """Add a product tile by tile, without a matrix of the weight's size."""
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
    """A lazy model that adds the principal to the residual when a tensor is loaded.

    The result is the original model, or the tuned model if the principal was trained.
    """

    residual: WeightSource
    principals: Mapping[str, tuple[tuple[Layer, Factors], ...]]  # tensor name -> principals of its layers
    untouched: bool  # whether this is the untrained principal of the residual, so that its exceptions apply
    original: Mapping[str, torch.dtype]  # original dtype of each tensor that the residual stores in another
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    label: str
    warnings: tuple[str, ...] = ()

    def load(self, name: str) -> Tensor:
        """Return a restored tensor.

        Raises InputError if a factor is not finite, does not fit the layer or overflows the dtype.
        """
        if name not in self.residual.tensors:
            return _marker(name)
        stored = self.residual.load(name)
        principals = self.principals.get(name, ())
        dtype = self.tensors[name].dtype
        if not principals:
            label = f"{name} of {self.label}"
            return stored if dtype == stored.dtype else rounded(stored.float(), dtype, label, hint=_TOO_LARGE)
        fused = any(layer.rows is not None for layer, _ in principals)
        result = new_copy(stored, dtype) if fused else None
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
    """Raise InputError if the product of the factors and the layer differ in shape."""
    if weight_shape(low_rank) != layer.shape:
        raise InputError(
            f"layer {layer.name} of {label} has shape {layer.shape}, "
            f"the adapter is made for {weight_shape(low_rank)}",
            hint="the adapter was made for a model of another size: pass that model",
        )


def merged(
    base: WeightSource,
    adapters: Strengths,
    *,
    dtype: torch.dtype | None = None,
    cast_all: bool = False,
) -> Merged | Restored:
    """Return the lazy model W + sum of strength * change over the adapters.

    Changed tensors have `dtype`; the default is the dtype of the base, or the original dtype that a residual
    records. With `cast_all`, all tensors of the UNet and the encoders have `dtype`. Raises PairingError if
    base and adapter cannot be combined, and InputError if an adapter has layers that the base lacks.
    """
    counted = [(adapter, strength_of(strength)) for adapter, strength in adapters]
    rules = [
        pairing(base, adapter, strengthens=max(strength.by_part.values()) > 0)
        for adapter, strength in counted
    ]
    if BaseKind.of(base) is BaseKind.RESIDUAL:
        # only the principal at strength 1 restores the model
        if len(counted) != 1 or not counted[0][1].is_one:
            raise InputError(
                f"{base.label} is a residual: expected only its principal at strength 1, "
                f"got {len(counted)} at {'; '.join(str(strength) for _, strength in counted)}",
                hint="rebuild the model first, then add other adapters to it",
            )
        only = counted[0][0]
        assert not isinstance(only, GeneralAdapter)  # an error of `pairing`
        model: Merged | Restored = restored(base, only, dtype=dtype)
    else:
        model = _merged(
            base,
            [
                (_active_layers(adapter, strength), _change(base, adapter, strength, action))
                for (adapter, strength), (action, _) in zip(counted, rules, strict=True)
            ],
            counted,
            dtype,
        )
    if cast_all and dtype is not None:
        model = replace(model, tensors=cast_weights(model.tensors, dtype))
    return replace(model, warnings=(*model.warnings, *(warning for _, warning in rules if warning)))


def restored(
    residual: WeightSource, adapter: Adapter | TunedAdapter, *, dtype: torch.dtype | None = None
) -> Restored:
    """Return the lazy model residual + principal; the principal may have been trained.

    Raises PairingError with both hashes if the two do not belong together.
    """
    check_none_replaced(residual, adapter)
    untouched = check_residual_pair(residual, adapter)
    principals = _by_tensor(residual, [(list(adapter.layers), _full_factors(adapter))])
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
        warnings=() if untouched else rounded_factors(residual, adapter),
    )


def _change(base: WeightSource, adapter: AnyAdapter, strength: Strength, action: Action) -> Change:
    """Return what an adapter adds to a base: its change, or the tuned factors if the base lacks the frame."""
    if isinstance(adapter, GeneralAdapter):
        return lambda name: partial(adapter.layers[name].change, strength=strength.of(name))
    if not (isinstance(adapter, TunedAdapter) and action is Action.REPLACE):
        return _scaled(adapter, strength)
    missing = [layer.name for layer in build_catalogue(base) if layer.name not in adapter.layers]
    if missing:
        raise PairingError(
            f"{base.label} is a residual, and {adapter.label} lacks the principal of {len(missing)} of its "
            f"layers: {some_of(missing)}",
            hint="first rebuild the original with the complete principal, then pass it as `base`",
        )
    if not strength.is_one:
        raise InputError(
            f"{base.label} is a residual: expected its principal at strength 1, got {strength}",
            hint="rebuild the model first, then add other adapters to it",
        )
    check_none_replaced(base, adapter)
    return _full_factors(adapter)


def _active_layers(adapter: AnyAdapter, strength: Strength) -> list[str]:
    """Return the layers with a strength other than 0."""
    return [name for name in adapter.layers if strength.of(name)]


def _scaled(adapter: Adapter | TunedAdapter, strength: Strength) -> Factors:
    def of(name: str) -> LowRank:
        low_rank = added_to_base(adapter.layers[name])
        return replace(low_rank, alpha=low_rank.alpha * strength.of(name))

    return of


def _full_factors(adapter: Adapter | TunedAdapter) -> Factors:
    """Return what an adapter adds to a residual: the principal or the tuned factors."""
    return lambda name: added_to_residual(adapter.layers[name])


def _merged(
    base: WeightSource,
    parts: Sequence[tuple[Sequence[str], Change]],
    counted: Sequence[tuple[AnyAdapter, Strength]],
    dtype: torch.dtype | None,
) -> Merged:
    adapters = [adapter for adapter, _ in counted]
    model = Merged(
        base=base,
        changes=_by_tensor(base, parts),
        metadata=_model_metadata(base, adapters),
        tensors=_marked(base.tensors, base, adapters),
        label=" + ".join([base.label, *(adapter.label for adapter in adapters)]),
        replaced=replacements(base, counted),
        added=additions(base, counted),
    )
    tensors = _typed(model.tensors, model.touched, {}, dtype)
    notes = rounding_notes(model.replaced.values(), tensors, base.label)
    return replace(model, tensors=tensors, warnings=notes)


def _by_tensor(
    base: WeightSource, parts: Sequence[tuple[Sequence[str], C]]
) -> dict[str, tuple[tuple[Layer, C], ...]]:
    """Map the name of each changed tensor to its layers and their changes.

    Raises InputError if an adapter has layers that the base does not have.
    """
    catalogue = build_catalogue(base, all_layers=True)
    changes: dict[str, tuple[tuple[Layer, C], ...]] = {}
    for layers, of in parts:
        unknown = [name for name in layers if name not in catalogue.by_name]
        if unknown:
            raise InputError(
                f"{len(unknown)} of {len(layers)} layers are not in {base.label}: {some_of(unknown)}",
                hint="the adapter was made for another model: pass that model",
            )
        for name in layers:
            layer = catalogue.by_name[name]
            check_dtype(base.tensors[layer.tensor].dtype, f"layer {name} of {base.label}", residual=True)
            changes[layer.tensor] = (*changes.get(layer.tensor, ()), (layer, of))
    return changes


def _typed(
    tensors: Mapping[str, TensorInfo],
    changed: Collection[str],
    original: Mapping[str, torch.dtype],
    dtype: torch.dtype | None,
) -> dict[str, TensorInfo]:
    """Set the dtype of changed tensors to `dtype`, or to their original dtype if None."""
    return {
        name: replace(info, dtype=dtype or original.get(name, info.dtype)) if name in changed else info
        for name, info in tensors.items()
    }


def cast_weights(tensors: Mapping[str, TensorInfo], dtype: torch.dtype) -> dict[str, TensorInfo]:
    """Set the dtype of all weights of the UNet and the encoders; the autoencoder keeps its dtypes."""
    return {
        name: replace(info, dtype=dtype)
        if info.dtype.is_floating_point and info.numel and name.startswith((UNET_ROOT, _ENCODERS))
        else info
        for name, info in tensors.items()
    }


def _marked(
    tensors: Mapping[str, TensorInfo], base: WeightSource, adapters: Sequence[AnyAdapter]
) -> dict[str, TensorInfo]:
    """Add or drop the marker tensors of the prediction if training changed the prediction."""
    before = _declared(base.metadata)
    after = _declared(_model_metadata(base, adapters))
    if after == before or after.prediction is None:
        return dict(tensors)
    expected = {V_KEY: after.prediction == "v", ZERO_SNR_KEY: after.noise_schedule == "zero_terminal_snr"}
    kept = {name: info for name, info in tensors.items() if expected.get(name, True)}
    for name, is_expected in expected.items():
        if is_expected and name not in kept:
            kept[name] = TensorInfo(name, _marker(name).dtype, tuple(_marker(name).shape))
    return kept


def _declared(metadata: Mapping[str, str]) -> Provenance:
    declared = Provenance.from_metadata(metadata)
    return Provenance(prediction=declared.prediction, noise_schedule=declared.noise_schedule)


def _marker(name: str) -> Tensor:
    """Return an empty tensor; only its name matters."""
    assert name in (V_KEY, ZERO_SNR_KEY), f"{name} is not in the base"
    return torch.empty(0)


def _model_metadata(base: WeightSource, adapters: Sequence[AnyAdapter]) -> dict[str, str]:
    """Return the metadata of the base with the objective and VAE settings of the adapters' training."""
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
        vae_settings = (tuned_for.vae_scale, tuned_for.vae_shift, tuned_for.vae_padding, tuned_for.vae_name)
        if any(value is not None for value in vae_settings):
            provenance = replace(
                provenance,
                vae_scale=tuned_for.vae_scale,
                vae_shift=tuned_for.vae_shift,
                vae_padding=tuned_for.vae_padding,
                vae_name=tuned_for.vae_name,
            )
    provenance = replace(provenance, role=Role.MODEL, principal_hash=None, version=spectune_version())
    replaced = {f"{PREFIX}{name}" for name in provenance.__dataclass_fields__}
    replaced |= {BASE_DTYPES_KEY, PRINCIPAL_DTYPE_KEY}
    if provenance.prediction is not None:
        replaced.add(MODELSPEC_PREDICTION_KEY)
    kept = {key: value for key, value in base.metadata.items() if key not in replaced}
    return kept | provenance.to_metadata() | modelspec_metadata(provenance.prediction)
