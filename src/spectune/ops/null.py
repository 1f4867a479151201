"""The zero model: a checkpoint with the header of another one and zeros for its numbers."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.reader import Checkpoint
from spectune.files.writer import check_target, partial_path, refuse_inputs, remove_leftovers
from spectune.operation import operation
from spectune.ops.options.model_files import NullOptions
from spectune.pairs.rules import check_whole_model
from spectune.sdxl.inference import layout_of

KEPT_SUFFIXES = (".position_ids", ".logit_scale")  # ComfyUI's nodes that merge models leave these alone
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class NullReport:
    """A zero model and what in it is not zero."""

    path: Path
    nbytes: int
    tensors: int
    kept: tuple[str, ...]  # tensors with the numbers of the original


@dataclass(frozen=True)
class _ZeroSpan:
    """Where the bytes of a tensor lie in its file."""

    name: str
    begin: int
    nbytes: int


@operation(NullOptions)
def null(options: NullOptions) -> NullReport:
    """Write the zero model of a checkpoint: the same header bytes, every tensor at the same offset, all zero.

    UNet, both text encoders and the VAE are zero, so that `original - null` is the original and an extract
    from the pair is an extract of the whole model. Copied from the original are its metadata and the
    tensors `*.position_ids` and `*.logit_scale`, which ComfyUI's merging nodes do not subtract. The model
    draws nothing: it is for programs that take two models and work on their difference.

    Raises InputError if `model` is not a single-file SDXL checkpoint, or is a residual or an adapter, and
    if `out` exists without `force`, is `model` itself, or does not fit on the disk.
    """
    model, out = options.model, options.out
    with open_checkpoint(model) as source:
        _check_model(source)
        refuse_inputs(out, source.paths)
    nbytes = model.stat().st_size
    check_target(out, nbytes, force=options.force)
    remove_leftovers(out)
    partial = partial_path(out)
    try:
        with model.open("rb") as original, partial.open("wb") as target:
            spans = _read_spans(original)
            kept = [span for span in spans if span.name.endswith(KEPT_SUFFIXES)]
            # what is never written reads as zeros, and takes no room where files may have holes
            target.truncate(nbytes)
            _copy(original, target, 0, min(span.begin for span in spans))
            for span in kept:
                _copy(original, target, span.begin, span.nbytes)
            target.flush()
            os.fsync(target.fileno())
        partial.replace(out)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return NullReport(out, nbytes, len(spans), tuple(span.name for span in kept))


def _check_model(source: Checkpoint) -> None:
    if source.paths != (source.path,):
        raise InputError(
            f"{source.label} is stored in several files: the zero model has the layout of one",
            hint="save the model as a single .safetensors file first",
        )
    layout_of(source.tensors, label=source.label)  # no adapter, no other architecture
    check_whole_model(source)


def _read_spans(file: BinaryIO) -> list[_ZeroSpan]:
    """The places of all tensors, out of a header that the reader has checked."""
    length = int.from_bytes(file.read(8), "little")
    header = cast(dict[str, Any], json.loads(file.read(length)))
    header.pop("__metadata__", None)
    places = {name: cast(list[int], entry["data_offsets"]) for name, entry in header.items()}
    return [_ZeroSpan(name, 8 + length + begin, end - begin) for name, (begin, end) in places.items()]


def _copy(original: BinaryIO, target: BinaryIO, begin: int, nbytes: int) -> None:
    """Copy `nbytes` bytes at `begin` to the same place."""
    original.seek(begin)
    target.seek(begin)
    while nbytes:
        chunk = original.read(min(nbytes, _CHUNK_BYTES))
        if not chunk:
            raise InputError("the checkpoint ended early", hint="was it changed while it was being read?")
        target.write(chunk)
        nbytes -= len(chunk)
