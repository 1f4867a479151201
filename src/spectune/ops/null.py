"""Write the zero model of a checkpoint: the same header, and zeros as weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.reader import Checkpoint, check_unchanged, version_of
from spectune.files.rename import partial_path, publish, remove_leftovers
from spectune.files.text import load_json
from spectune.files.writer import check_target, refuse_inputs
from spectune.operation import operation
from spectune.ops.options.model_files import NullOptions
from spectune.pairs.rules import check_whole_model
from spectune.sdxl.inference import part_layouts

KEPT_SUFFIXES = (".position_ids", ".logit_scale")  # ComfyUI's model merging nodes do not subtract these
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class NullReport:
    """The zero model, and the tensors that are not zero."""

    path: Path
    nbytes: int
    tensors: int
    kept: tuple[str, ...]  # tensors copied from the original


@dataclass(frozen=True)
class _TensorSpan:
    """The byte range of a tensor in its file."""

    name: str
    begin: int
    nbytes: int


@operation(NullOptions)
def null(options: NullOptions) -> NullReport:
    """Write the zero model of a checkpoint: the same header and the same offsets, with all weights zero.

    The UNet, both text encoders and the VAE are zero, so `original - null` is the original, and a LoRA
    extracted from the two files is extracted from the full weights. Metadata and the tensors
    `*.position_ids` and `*.logit_scale` are copied from the original, because ComfyUI's model merging nodes
    do not subtract them. The zero model cannot generate pictures. It is for programs that work on the
    difference of two models.

    Raises InputError if `model` is not a single-file SDXL checkpoint, or is a residual or an adapter. Also
    raises it if `out` exists without `force`, is `model` itself, or does not fit on the disk.
    """
    model, out = options.model, options.out
    with open_checkpoint(model) as source:
        _check_model(source)
        refuse_inputs(out, source.paths)
    nbytes = model.stat().st_size
    remove_leftovers(out)
    check_target(out, nbytes, force=options.force)
    partial = partial_path(out)
    try:
        with model.open("rb") as original, partial.open("wb") as target:
            before = version_of(original)
            spans = _read_spans(original)
            kept = [span for span in spans if span.name.endswith(KEPT_SUFFIXES)]
            # Bytes that are never written read as zeros. Sparse files use no disk space for them.
            target.truncate(nbytes)
            _copy(original, target, 0, min(span.begin for span in spans))
            for span in kept:
                _copy(original, target, span.begin, span.nbytes)
            check_unchanged(original, before, model)
            target.flush()
            os.fsync(target.fileno())
        publish(partial, out, force=options.force)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return NullReport(out, nbytes, len(spans), tuple(span.name for span in kept))


def _check_model(source: Checkpoint) -> None:
    if source.paths != (source.path,):
        raise InputError(
            f"{source.label} is stored in several files: expected a single .safetensors file",
            hint="write a single file with `spectune convert` first",
        )
    part_layouts(source.tensors, label=source.label)  # raises for an adapter or another architecture
    check_whole_model(source)


def _read_spans(file: BinaryIO) -> list[_TensorSpan]:
    """Return the byte ranges of all tensors. The reader has checked the header before."""
    length = int.from_bytes(file.read(8), "little")
    header = cast(dict[str, Any], load_json(file.read(length)))
    header.pop("__metadata__", None)
    offsets = {name: cast(list[int], entry["data_offsets"]) for name, entry in header.items()}
    return [_TensorSpan(name, 8 + length + begin, end - begin) for name, (begin, end) in offsets.items()]


def _copy(original: BinaryIO, target: BinaryIO, begin: int, nbytes: int) -> None:
    """Copy `nbytes` bytes at offset `begin` to the same offset."""
    original.seek(begin)
    target.seek(begin)
    while nbytes:
        chunk = original.read(min(nbytes, _CHUNK_BYTES))
        if not chunk:
            raise InputError(
                f"the checkpoint ended {nbytes} bytes too early",
                hint="another program may have changed it; run the command again",
            )
        target.write(chunk)
        nbytes -= len(chunk)
