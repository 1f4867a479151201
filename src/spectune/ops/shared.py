"""Helpers that several operations on files use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from spectune.adapters.adapter import Adapter, AnyAdapter, TunedAdapter
from spectune.adapters.detect import is_adapter
from spectune.adapters.spellings import Spelling
from spectune.checkpoints.open import TensorWriter, open_checkpoint
from spectune.errors import InputError
from spectune.files.pipeline import Progress, report_progress, run_pipeline
from spectune.files.provenance import PREFIX, Provenance, spectune_version
from spectune.files.reader import MODEL_INDEX, Checkpoint
from spectune.files.source import TensorInfo, WeightSource, declared_prediction
from spectune.files.weights_hash import WeightsHasher
from spectune.files.writer import refuse_inputs
from spectune.sdxl.layers import Catalogue, build_catalogue

# Metadata that is valid only for the bytes of the original file.
STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")


def template_of(base: Checkpoint) -> Path | None:
    """Return the diffusers folder whose small files are copied, or None if the base is not such a folder."""
    folder = base.path.parent if base.path.name == MODEL_INDEX else base.path
    return folder if (folder / MODEL_INDEX).is_file() else None


def write_all(model: WeightSource, writer: TensorWriter, progress: Progress | None) -> None:
    """Compute and write every tensor of a model."""
    names, done = list(model.tensors), 0

    def write(name: str, tensor: Tensor) -> None:
        nonlocal done
        writer.write(name, tensor)
        report_progress(progress, done, len(names), name)
        done += 1

    def compute(name: str) -> Tensor:
        tensor = model.load(name)
        writer.hash_ahead(name, tensor)
        return tensor

    run_pipeline(names, compute, write, size=lambda name: model.tensors[name].nbytes)
    report_progress(progress, done, len(names), "")


@dataclass(frozen=True)
class Hashed:
    """A source that hashes each tensor when it is loaded. Every tensor must be loaded once."""

    source: WeightSource
    hasher: WeightsHasher

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.source.metadata

    @property
    def provenance(self) -> Provenance:
        return self.source.provenance

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.source.tensors

    @property
    def label(self) -> str:
        return self.source.label

    def load(self, name: str) -> Tensor:
        tensor = self.source.load(name)
        self.hasher.add(name, tensor)
        return tensor


def origin_of(base: Checkpoint) -> Provenance:
    """Return the provenance that every file made from `base` records."""
    return replace(
        base.provenance,
        version=spectune_version(),
        base_name=base.label,
        principal_hash=None,
        prediction=declared_prediction(base),
    )


def refuse_overwriting(out: Path, sources: Sequence[Checkpoint | AnyAdapter]) -> None:
    """Raise InputError if `out` is one of the input files."""
    files = [source if isinstance(source, Checkpoint) else source.file for source in sources]
    refuse_inputs(out, [path for file in files if file is not None for path in file.paths])


def catalogue_of(base: Path, out: Path) -> Catalogue:
    """Return all layers of a checkpoint from its header. Raises InputError if `out` would overwrite it."""
    with open_checkpoint(base) as source:
        refuse_overwriting(out, [source])
        return build_catalogue(source, all_layers=True)


def check_stays_tuned(
    tuned: Adapter | TunedAdapter, spelling: Spelling, store: torch.dtype | None, *, even: bool = False
) -> None:
    """Raise InputError if options request a spelling, dtype or scale that trained deltas cannot have."""
    if spelling is not Spelling.KOHYA or store is not None or even:
        raise InputError(
            f"{tuned.label} holds trained deltas: these have only one spelling, dtype and scale",
            hint="`spectune export` writes them as a plain LoRA, in any spelling (`keys`)",
        )


def kept_metadata(metadata: Mapping[str, str], *, one_file: bool) -> dict[str, str]:
    """Return the metadata of an adapter that are still valid in a new file.

    Hashes, the title, the network sizes and all `spectune.` keys are removed: the writer sets them again.
    """
    sizes = (
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
        "lora_adapter_metadata",
    )
    names = ("modelspec.title",) if one_file else ("modelspec.title", "ss_output_name")
    removed = {*STALE, *sizes, *names}
    return {key: text for key, text in metadata.items() if key not in removed and not key.startswith(PREFIX)}


def is_checkpoint(path: Path) -> bool:
    """Return whether a file or folder is a checkpoint rather than an adapter."""
    with open_checkpoint(path) as source:
        return not is_adapter(source)
