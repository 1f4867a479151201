"""Which files belong together: roles and hashes checked before anything is added to anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast

import torch

from spectune.errors import InputError, PairingError
from spectune.weights.adapter import Adapter, TunedAdapter, low_rank_tensors
from spectune.weights.names import kohya_stem
from spectune.weights.provenance import PREFIX, Provenance, Role, WeightsHasher
from spectune.weights.reader import DTYPE_NAMES, DTYPES, WeightSource

BASE_DTYPES_KEY = f"{PREFIX}base_dtypes"
LAYER_COUNT_KEY = f"{PREFIX}layers"  # how many layers a residual lacks the principal of


def adapter_hash(adapter: Adapter) -> str:
    """The weights hash of the file that holds exactly these factors; reads every factor once."""
    hasher = WeightsHasher()
    for name in adapter.layers:
        for key, tensor in low_rank_tensors(kohya_stem(name), adapter.layers[name]).items():
            hasher.add(key, tensor)
    return hasher.hexdigest()


def check_goes_on(base: WeightSource, adapter: Adapter | TunedAdapter) -> None:
    """Raise PairingError when the roles of a base model and an adapter exclude each other.

    Hashes are not looked at here: `check_base_hash` does when the numbers of the base have been read.
    """
    base_role = Provenance.from_metadata(base.metadata).role
    role = Provenance.from_metadata(adapter.metadata).role
    if base_role is Role.RESIDUAL and role is not Role.PRINCIPAL and not isinstance(adapter, TunedAdapter):
        raise PairingError(
            f"{adapter.label} is for a whole model: {base.label} is a residual, which lacks its principal",
            hint="pass the original model as --base",
        )
    if base_role is not Role.RESIDUAL and role is Role.PRINCIPAL:
        raise PairingError(
            f"{adapter.label} is a principal adapter: {base.label} is no residual of spectune, "
            "so the principal part would be counted twice",
            hint="pass the residual that `spectune split` wrote beside the principal",
        )


def check_residual_pair(residual: WeightSource, adapter: Adapter | TunedAdapter) -> None:
    """Raise PairingError unless `residual` was made from the principal of `adapter`; names both hashes."""
    made_from = Provenance.from_metadata(residual.metadata)
    if made_from.role is not Role.RESIDUAL:
        role = made_from.role or "unknown"
        raise PairingError(
            f"{residual.label} is no residual of spectune: its role is {role}",
            hint="pass the residual that `spectune split` wrote beside the principal",
        )
    if isinstance(adapter, TunedAdapter):
        found = Provenance.from_metadata(adapter.metadata).principal_hash
        what = f"{adapter.label} was trained from principal"
    else:
        # a tuned principal names the one that it replaces; an untouched one is known by its own numbers
        replaces = Provenance.from_metadata(adapter.metadata).principal_hash
        found = replaces or adapter_hash(adapter)
        what = f"{adapter.label} replaces principal" if replaces else f"{adapter.label} is principal"
    if made_from.principal_hash != found:
        raise PairingError(
            f"{residual.label} belongs to principal {shown(made_from.principal_hash)}, {what} {shown(found)}",
            hint="pass the two files of one `spectune split`",
        )
    count = residual.metadata.get(LAYER_COUNT_KEY)
    if count is not None and count != str(len(adapter.layers)):
        raise PairingError(
            f"{residual.label} lacks the principal of {count} layers, "
            f"{adapter.label} has {len(adapter.layers)}",
            hint="it was trained on a part of the model; pass the original model as --base",
        )


def check_base_hash(found: str, adapter: Adapter | TunedAdapter, label: str) -> None:
    """Raise PairingError when a tuned adapter records another base than the one whose hash is `found`.

    A plain LoRA goes on any model.
    """
    if not isinstance(adapter, TunedAdapter):
        return
    recorded = Provenance.from_metadata(adapter.metadata).base_hash
    if recorded is not None and recorded != found:
        raise PairingError(
            f"{adapter.label} was trained from base {shown(recorded)}, {label} is {shown(found)}",
            hint="pass the model that the adapter was trained from; "
            "to use the adapter on another model, `spectune export` a plain LoRA",
        )


def shown(digest: str | None) -> str:
    """A hash as messages show it: its first 16 digits."""
    return "(none recorded)" if digest is None else digest[:16]


def base_dtypes_metadata(dtypes: Mapping[str, torch.dtype]) -> dict[str, str]:
    """The metadata entry for tensors that are stored in another type than the original's."""
    if not dtypes:
        return {}
    names = {name: DTYPE_NAMES[dtype] for name, dtype in dtypes.items()}
    return {BASE_DTYPES_KEY: json.dumps(names, separators=(",", ":"))}


def read_base_dtypes(source: WeightSource) -> dict[str, torch.dtype]:
    """The inverse of base_dtypes_metadata: the original types of tensors that are stored in another one."""
    text = source.metadata.get(BASE_DTYPES_KEY, "{}")
    try:
        names = cast(dict[str, str], json.loads(text))
        dtypes = {name: DTYPES[dtype] for name, dtype in names.items()}
    except (ValueError, AttributeError, KeyError, TypeError):
        raise InputError(
            f"metadata {BASE_DTYPES_KEY} of {source.label} cannot be read: "
            "expected tensor names with their types",
            hint="split the model again",
        ) from None
    return dtypes
