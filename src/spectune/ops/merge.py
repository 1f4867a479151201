"""Write the weighted sum of checkpoints."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from spectune.adapters.detect import is_adapter
from spectune.checkpoints.open import open_checkpoint, open_writer
from spectune.errors import InputError, check_all
from spectune.files.dtypes import parse_weight_dtype
from spectune.files.provenance import MERGED_KEY, modelspec_model
from spectune.files.reader import Checkpoint
from spectune.files.weights_hash import WeightsHasher
from spectune.operation import operation
from spectune.ops.options.model_files import MergeOptions
from spectune.ops.shared import Hashed, refuse_overwriting, template_of, write_all
from spectune.pairs.rules import check_whole_model
from spectune.pairs.weighted import weighted_sum


@dataclass(frozen=True)
class MergedFile:
    """A checkpoint of a weighted sum, as recorded in the metadata of the result."""

    file: str
    weights: str
    hash: str  # weights hash


@dataclass(frozen=True)
class MergeReport:
    """The result of `merge`."""

    path: Path
    hash: str
    models: tuple[MergedFile, ...]
    summed: int  # tensors that were computed from several
    cast: int  # copies in another dtype; the others are copied byte for byte
    tensors: int
    warnings: tuple[str, ...] = ()


@operation(MergeOptions)
def merge(options: MergeOptions) -> MergeReport:
    """Write the weighted sum of checkpoints, such as ["a.safetensors:0.7", "b.safetensors:0.3"].

    Each tensor is computed in float32 and rounded once. Tensors whose only weight is 1 are copied byte for
    byte, or cast to `dtype`. With weights that sum to 1, values that are equal in all checkpoints are
    unchanged. Progress counts tensors.

    Raises InputError for adapters and residuals, and for models of different sizes.
    """
    out, paths = options.out, list(dict.fromkeys(summand.path for summand in options.models))
    dtype = None if options.dtype is None else parse_weight_dtype(options.dtype)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(path)) for path in paths]
        refuse_overwriting(out, opened)
        check_all(opened, _check_model)
        summands = [(paths.index(summand.path), summand.weights) for summand in options.models]
        model = weighted_sum(opened, summands, dtype=dtype)
        hashed = [Hashed(source, WeightsHasher()) for source in opened]
        metadata = modelspec_model(model.metadata, title=out.name.removesuffix(".safetensors"))
        metadata |= {"modelspec.merged_from": ", ".join(path.name for path in paths), **model.metadata}
        infos = list(model.tensors.values())
        with open_writer(
            out, infos, metadata=metadata, force=options.force, template=template_of(opened[0])
        ) as writer:
            write_all(model.over(hashed), writer, options.progress)
            hashes = [_hash_of(source) for source in hashed]
            models = tuple(
                MergedFile(summand.path.name, str(summand), hashes[index])
                for summand, (index, _) in zip(options.models, summands, strict=True)
            )
            writer.metadata[MERGED_KEY] = json.dumps([vars(one) for one in models])
    return MergeReport(out, writer.hash, models, model.summed, model.cast, len(infos), model.warnings)


def _check_model(source: Checkpoint) -> None:
    """Raise InputError if a file is not a complete checkpoint."""
    if is_adapter(source):
        raise InputError(
            f"{source.label} is an adapter: expected a checkpoint",
            hint="`spectune rebuild` adds an adapter to a checkpoint, and `spectune slice` combines adapters",
        )
    check_whole_model(source, hint="rebuild the complete model with `spectune rebuild` first")


def _hash_of(source: Hashed) -> str:
    """Return the weights hash of a checkpoint; tensors that the sum did not need are read now."""
    for name in source.tensors:
        if name not in source.hasher:
            source.load(name)
    return source.hasher.hexdigest()
