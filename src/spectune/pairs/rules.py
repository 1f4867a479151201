"""Which files belong together: roles and hashes checked before anything is added to anything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import cast

import torch

from spectune.adapters.adapter import Adapter, LazyLayers, TunedAdapter
from spectune.adapters.writer import kohya_tensors
from spectune.errors import InputError, PairingError, some_of
from spectune.files.dtypes import DTYPES_BY_SAFETENSORS_NAME, SAFETENSORS_NAMES
from spectune.files.provenance import PREFIX, Role
from spectune.files.source import WeightSource
from spectune.files.weights_hash import WeightsHasher
from spectune.pairs.likeness import Likeness, likeness
from spectune.sdxl.layers import build_catalogue

BASE_DTYPES_KEY = f"{PREFIX}base_dtypes"
LAYER_COUNT_KEY = f"{PREFIX}layers"  # how many layers a residual lacks the principal of


def adapter_hash(adapter: Adapter) -> str:
    """The weights hash of the file in kohya keys with exactly these factors; reads every factor once."""
    hasher = WeightsHasher()
    for name in adapter.layers:
        for key, tensor in kohya_tensors(name, adapter.layers[name]).items():
            hasher.add(key, tensor)
    return hasher.hexdigest()


def check_goes_on(base: WeightSource, adapter: Adapter | TunedAdapter, *, strengthens: bool = True) -> str:
    """Raise PairingError when a base model and an adapter exclude each other; what is to be said otherwise.

    Files of spectune say what they are. Where one of them does not, a few layers are compared: a principal on
    the model that holds it already would count twice, unless it is taken away (not `strengthens`).
    Hashes are not looked at here: `check_base_hash` does when the numbers of the base have been read.
    """
    base_role = base.provenance.role
    told = adapter.provenance
    role = told.role
    if isinstance(adapter, TunedAdapter):
        return ""
    if base_role is Role.RESIDUAL:
        return "" if role is Role.PRINCIPAL else _check_belongs_to_residual(base, adapter, role)
    # a slice of files of other programs is called a LoRA too, and says nothing of its base
    if (role is Role.LORA and told.base_hash) or not strengthens:
        return ""
    known = base_role is Role.MODEL and role is Role.PRINCIPAL
    alike = Likeness(0.0, 0.0) if known else likeness(base, adapter)
    if alike.is_inside or (role is Role.PRINCIPAL and not alike.is_missing):
        told = "is" if role is Role.PRINCIPAL else "has the numbers of"
        raise PairingError(
            f"{adapter.label} {told} a principal adapter: {base.label} is no residual of spectune, "
            "so the principal part would be counted twice",
            hint="pass the residual that `spectune split` wrote beside the principal",
        )
    if alike.is_missing and base_role is None:
        return (
            f"{base.label} does not say that it is a residual; its numbers lack what {adapter.label} holds, "
            "so the two are taken for a pair"
        )
    return ""


def _check_belongs_to_residual(residual: WeightSource, adapter: Adapter, role: Role | None) -> str:
    """A foreign adapter on a residual may be its principal, trained by another program, but no LoRA."""
    if role is None and likeness(residual, adapter).is_missing:
        return (
            f"{adapter.label} does not say which principal it was trained from; its numbers are those of "
            f"one, so it is taken for that of {residual.label}"
        )
    raise PairingError(
        f"{adapter.label} is for a whole model: {residual.label} is a residual, which lacks its principal",
        hint="pass the original model as --base",
    )


def check_residual_pair(residual: WeightSource, adapter: Adapter | TunedAdapter) -> bool:
    """Whether `adapter` is, number for number, the principal that was taken out of `residual`.

    Raise PairingError, naming both hashes, unless it is that one or was trained from it; a file of another
    program, which names none, is judged by its numbers.
    """
    made_from = residual.provenance
    if made_from.role is not Role.RESIDUAL:
        role = made_from.role or "unknown"
        raise PairingError(
            f"{residual.label} is no residual of spectune: its role is {role}",
            hint="pass the residual that `spectune split` wrote beside the principal",
        )
    replaces_another = True
    if isinstance(adapter, TunedAdapter):
        found = adapter.provenance.principal_hash
        what = f"{adapter.label} was trained from principal"
    else:
        # a tuned principal names the one that it replaces; an untouched one is known by its own numbers
        replaces = adapter.provenance.principal_hash
        replaces_another = replaces is not None
        found = replaces or adapter_hash(adapter)
        what = f"{adapter.label} replaces principal" if replaces else f"{adapter.label} is principal"
    foreign = adapter.provenance.role is None
    if made_from.principal_hash != found and not (foreign and likeness(residual, adapter).is_missing):
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
    return made_from.principal_hash == found and not replaces_another


def check_base_hash(found: str, adapter: Adapter | TunedAdapter, label: str) -> None:
    """Raise PairingError when a tuned adapter records another base than the one whose hash is `found`.

    A plain LoRA goes on any model.
    """
    if not isinstance(adapter, TunedAdapter):
        return
    told = adapter.provenance
    recorded = told.base_hash
    if recorded not in (None, found, foreign_residual_hash(found, told.principal_hash)):
        raise PairingError(
            f"{adapter.label} was trained from base {shown(recorded)}, {label} is {shown(found)}",
            hint="pass the model that the adapter was trained from; "
            "to use the adapter on another model, `spectune export` a plain LoRA",
        )


def lacks_frame(base: WeightSource, adapter: Adapter | TunedAdapter) -> bool:
    """Whether the base is a residual of another program, and the tuned adapter holds what it lacks.

    Raises PairingError when the adapter holds only a part of it.
    """
    told = adapter.provenance
    if not isinstance(adapter, TunedAdapter) or told.principal_hash is None:
        return False
    if base.provenance.role is not None:
        return False
    frames = LazyLayers(
        {name: adapter.rank(name) for name in adapter.layers}, {}, lambda name: adapter.layers[name].frame
    )
    if not likeness(base, Adapter(frames, {}, adapter.label)).is_missing:
        return False
    missing = [layer.name for layer in build_catalogue(base) if layer.name not in adapter.layers]
    if missing:
        raise PairingError(
            f"{base.label} is a residual, and {adapter.label} lacks the principal of {len(missing)} of its "
            f"layers: {some_of(missing)}",
            hint="rebuild the original with the whole principal first, and pass that as --base",
        )
    return True


def foreign_residual_hash(residual_hash: str, principal_hash: str | None) -> str:
    """What stands for the base hash of a model known only as a residual of another program.

    No file has this hash, so that nobody takes the residual for the original.
    """
    return hashlib.sha256(f"{residual_hash}+{principal_hash}".encode()).hexdigest()


def foreign_base_warning(found: str, adapter: Adapter | TunedAdapter, label: str) -> str:
    """What is to be said of a LoRA on another model than the one it was made for; empty for its own.

    A principal names the model that it was taken out of, and goes on what was left.
    """
    if isinstance(adapter, TunedAdapter):
        return ""
    told = adapter.provenance
    if told.role is Role.PRINCIPAL or told.base_hash in (None, found):
        return ""
    return (
        f"{adapter.label} was made for base {shown(told.base_hash)} ({told.base_name or 'unnamed'}), "
        f"{label} is {shown(found)}: a LoRA goes on relatives of its base, how well only pictures tell"
    )


def shown(digest: str | None) -> str:
    """A hash as messages show it: its first 16 digits."""
    return "(none recorded)" if digest is None else digest[:16]


def base_dtypes_metadata(dtypes: Mapping[str, torch.dtype]) -> dict[str, str]:
    """The metadata entry for tensors that are stored in another type than the original's."""
    if not dtypes:
        return {}
    names = {name: SAFETENSORS_NAMES[dtype] for name, dtype in dtypes.items()}
    return {BASE_DTYPES_KEY: json.dumps(names, separators=(",", ":"))}


def read_base_dtypes(source: WeightSource) -> dict[str, torch.dtype]:
    """The inverse of base_dtypes_metadata: the original types of tensors that are stored in another one."""
    text = source.metadata.get(BASE_DTYPES_KEY, "{}")
    try:
        names = cast(dict[str, str], json.loads(text))
        dtypes = {name: DTYPES_BY_SAFETENSORS_NAME[dtype] for name, dtype in names.items()}
    except (ValueError, AttributeError, KeyError, TypeError):
        raise InputError(
            f"metadata {BASE_DTYPES_KEY} of {source.label} cannot be read: "
            "expected tensor names with their types",
            hint="split the model again",
        ) from None
    return dtypes
