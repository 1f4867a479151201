"""The base of a run: its hash, its checks, and the frames that it is trained in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from spectune.adapters.adapter import Adapter
from spectune.adapters.reader import open_adapter
from spectune.adapters.writer import adapter_hash
from spectune.checkpoints.open import open_checkpoint
from spectune.core.low_rank import LowRank
from spectune.errors import InputError, PairingError
from spectune.files.provenance import Provenance, Role
from spectune.files.source import WeightSource
from spectune.files.weights_hash import weights_hash
from spectune.pairs.rules import BaseKind, check_frame, check_residual_pair, short_hash
from spectune.sdxl.layers import Catalogue, build_catalogue
from spectune.training.frames.making import make_frames
from spectune.training.recipe.sections.model import ModelSection
from spectune.training.tuned_start import TunedStart, open_start

Log = Callable[[str], None]


@dataclass(frozen=True)
class SavedFrames:
    """Frames that the run computed from its base before it was interrupted."""

    base_hash: str | None
    layers: Mapping[str, LowRank]


@dataclass(frozen=True)
class ReadBase:
    """The checkpoint that is trained, and the frames that a file holds for it."""

    hash: str
    provenance: Provenance  # as it declares
    catalogue: Catalogue
    frames: Mapping[str, LowRank] | None  # None: they are computed from the weights
    principal_hash: str | None = None
    start: TunedStart | None = None


def read_base(
    section: ModelSection, *, saved: SavedFrames | None = None, log: Log = lambda text: None
) -> ReadBase:
    """Hash the base of a recipe, and read the frames of its start, of its principal or of a saved state.

    Args:
        section: The [model] section of a recipe.
        saved: Frames of a saved state. They are used if their base hash matches.
        log: Receives progress messages.

    Raises:
        InputError: A file is of the wrong kind.
        PairingError: The files do not belong together.
    """
    with open_checkpoint(section.checkpoint) as base:
        _check_role(section, base.provenance)
        log(f"reading {section.checkpoint.name}")
        base_hash = weights_hash(base)
        catalogue = build_catalogue(base, all_layers=True)
        frames: Mapping[str, LowRank] | None = None
        principal_hash, start = None, None
        if section.start is not None:
            start = open_start(section, catalogue, base_hash, base.label)
            log(f"starting from {section.start.name}")
            frames = {name: delta.frame for name, delta in start.deltas.items()}
        elif section.principal is not None:
            adapter = _open_principal(section, catalogue)
            _check_pair(section, base, base_hash, adapter)
            frames, principal_hash = adapter.layers, adapter_hash(adapter)
        elif section.is_full:
            frames = {}
        elif saved is not None and saved.base_hash == base_hash:
            frames = saved.layers
        return ReadBase(base_hash, base.provenance, catalogue, frames, principal_hash, start)


def frames_of(
    base: ReadBase, section: ModelSection, seed: int, *, log: Log = lambda text: None
) -> Mapping[str, LowRank]:
    """Return the frames of all layers. The processes of a run, which need the same base, divide the work.

    Raises:
        SpectuneError: A weight is not finite, on any process.
    """
    if base.frames is not None:
        return base.frames
    verb = "splitting" if section.uses_weights else "computing frames for"
    log(f"{verb} {section.checkpoint.name} at rank {section.rank}")
    with open_checkpoint(section.checkpoint) as source:
        return make_frames(source, base.catalogue, section, seed)


# ---------------------------------------------------------------- checks of the files


def _check_role(section: ModelSection, declared: Provenance) -> None:
    path = section.checkpoint
    if declared.role is not None and declared.role not in (Role.MODEL, Role.RESIDUAL):
        raise InputError(
            f"{path} is a {declared.role.value} file: expected a checkpoint",
            hint="set model.base to the checkpoint, and model.principal to the adapter that `spectune split` "
            "made from it",
        )
    if section.residual is not None and declared.role is Role.MODEL:
        raise InputError(
            f"{path} is a complete model: model.residual must be a model without its principal",
            hint="set model.base to this file instead",
        )
    if declared.role is Role.RESIDUAL and section.form == "delta":
        raise InputError(
            f"{path} is a residual: the delta form trains on the original weights",
            hint='set model.base to the original checkpoint, or set model.form = "residual"',
        )
    if declared.role is Role.RESIDUAL and section.principal is None:
        raise InputError(
            f"{path} is a residual: it can only be trained with its principal",
            hint="remove model.rank and set model.principal to the principal of this residual",
        )


def _open_principal(section: ModelSection, catalogue: Catalogue) -> Adapter:
    assert section.principal is not None
    adapter = open_adapter(section.principal, catalogue)
    check_frame(adapter)
    assert isinstance(adapter, Adapter)
    return adapter


def _check_pair(section: ModelSection, base: WeightSource, base_hash: str, adapter: Adapter) -> None:
    declared = adapter.provenance
    if BaseKind.of(base) is BaseKind.RESIDUAL:
        check_residual_pair(base, adapter)
    elif section.residual is None and declared.base_hash not in (None, base_hash):
        raise PairingError(
            f"{adapter.label} was split from base {short_hash(declared.base_hash)}, but "
            f"{base.label} is {short_hash(base_hash)}",
            hint="set model.base to the model that it was split from, or split this one",
        )
