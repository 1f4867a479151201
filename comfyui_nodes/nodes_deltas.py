"""Apply Tuned Deltas: add a tuned adapter to the model that it was trained from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from spectune.adapters.adapter import Adapter, TunedAdapter
from spectune.adapters.reader import open_adapter
from spectune.checkpoints.open import open_checkpoint
from spectune.core.lora import change_factors
from spectune.errors import InputError
from spectune.files.weights_hash import WeightsHasher
from spectune.pairs.rules import check_base_hash

from .library import library, progress_bar
from .patching import catalogue_of, patched
from .places import listed, listed_or_none, optional_path, path_of, stamp
from .sampling import is_set, sampled_as

_STRENGTH = {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.01}
_hashes: dict[tuple[Path, str], str] = {}  # (path, stamp) -> weights hash


class SpectuneApplyDeltas:
    """Add the trained change of every layer to the original model, in float32."""

    CATEGORY = "spectune"
    DESCRIPTION = "Adds a tuned adapter of `spectune train` to the model it was trained from."
    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "clip": ("CLIP",),
                "adapter": (listed("loras"),),
                "strength_model": ("FLOAT", dict(_STRENGTH)),
                "strength_clip": ("FLOAT", dict(_STRENGTH)),
            },
            "optional": {
                "checkpoint": (
                    listed_or_none("checkpoints"),
                    {"tooltip": "If set, the node checks that the adapter was trained from this file."},
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, adapter: str, **others: object) -> str:
        return stamp(lambda: path_of("loras", adapter))

    def apply(
        self,
        model: Any,
        clip: Any,
        adapter: str,
        strength_model: float,
        strength_clip: float,
        checkpoint: str = "none",
    ) -> tuple[Any, Any]:
        base = optional_path("checkpoints", checkpoint)
        with library(), open_adapter(path_of("loras", adapter), catalogue_of(model, clip)) as opened:
            tuned = _tuned(opened)
            _check_sampling(model, tuned)
            if base is not None:
                _check_base(tuned, base)
            changes = {name: change_factors(tuned.layers[name], name) for name in tuned.layers}
        return patched(model, clip, changes, strength_model=strength_model, strength_clip=strength_clip)


def _tuned(opened: Adapter | TunedAdapter) -> TunedAdapter:
    if isinstance(opened, TunedAdapter):
        return opened
    raise InputError(
        f"{opened.label} is not a tuned adapter: it has no delta_down and delta_up",
        hint="load a plain LoRA with Load LoRA, and a principal with Load Residual + Principal",
    )


def _check_sampling(model: Any, tuned: TunedAdapter) -> None:
    """Raise InputError if a node has set another prediction type than that of the adapter.

    If the checkpoint set it, only warn: a sampling node may still follow this node.
    """
    provenance = tuned.provenance
    trained, sampled = provenance.prediction, sampled_as(model)
    if provenance.vae_name is not None:
        logging.warning("spectune: %s was trained with the VAE %s", tuned.label, provenance.vae_name)
    if trained is None or sampled is None or trained == sampled:
        return
    problem = f"{tuned.label} was trained to predict {trained}, but the MODEL is sampled as {sampled}"
    if is_set(model) or trained == "eps":
        raise InputError(
            problem, hint="use Flow Sampling From File with this adapter, and no other sampling node"
        )
    logging.warning("spectune: %s; connect Flow Sampling From File after Apply Tuned Deltas", problem)


def _check_base(tuned: TunedAdapter, base: Path) -> None:
    """Raise PairingError with both hashes if the adapter was trained from another checkpoint."""
    if tuned.provenance.base_hash is None:
        raise InputError(
            f"{tuned.label} does not declare the model it was trained from", hint="set checkpoint to none"
        )
    key = (base, stamp(lambda: base))
    if key not in _hashes:
        _hashes[key] = _hash_of(base)
    check_base_hash(_hashes[key], tuned, base.name)


def _hash_of(path: Path) -> str:
    hasher, step = WeightsHasher(), progress_bar()
    with open_checkpoint(path) as source:
        for done, name in enumerate(source.tensors):
            step(done, len(source.tensors), name)
            hasher.add(name, source.load(name))
    return hasher.hexdigest()
