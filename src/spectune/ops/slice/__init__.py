"""Combine layers of adapters, or parts of checkpoints, into one file."""

from __future__ import annotations

from spectune.errors import InputError
from spectune.operation import operation
from spectune.ops.options.adapter_files import SliceOptions
from spectune.ops.other_kinds import has_whole_tensors, is_other_kind
from spectune.ops.shared import is_checkpoint
from spectune.ops.slice.adapters import SliceReport, slice_adapters
from spectune.ops.slice.other_kinds import slice_other_kinds
from spectune.ops.slice.parts import SwapReport, swap_parts
from spectune.ops.slice.whole_tensors import slice_whole_tensors


@operation(SliceOptions)
def slice(options: SliceOptions) -> SliceReport | SwapReport:
    """Combine parts of files, such as "style.safetensors:unet:0.8" and "face.safetensors:te".

    From adapters it takes layers by trait: te, unet, content, style, a block, a pattern, or a name in the
    JSON file `traits`. Layers that several slices contain are summed. From checkpoints it takes complete
    parts: unet, te1, te2, vae.
    """
    if not options.slices:
        raise InputError(
            "`slices` is empty: expected at least one file", hint="for example style.safetensors:te"
        )
    checkpoints = {
        path: is_checkpoint(path) for path in dict.fromkeys(piece.path for piece in options.slices)
    }
    if len(set(checkpoints.values())) > 1:
        model, adapter = (
            next(path.name for path in checkpoints if checkpoints[path] is kind) for kind in (True, False)
        )
        raise InputError(
            f"{model} is a checkpoint and {adapter} is an adapter: expected files of one kind",
            hint="to merge an adapter into a checkpoint, use `spectune rebuild`",
        )
    if not all(checkpoints.values()):
        if any(map(has_whole_tensors, checkpoints)):
            return slice_whole_tensors(options)
        if any(map(is_other_kind, checkpoints)):
            return slice_other_kinds(options)
        return slice_adapters(options)
    default = SliceOptions(options.slices, options.out)
    names = ("traits", "base", "keys", "dtype", "overlap")
    extra = [f"`{name}`" for name in names if getattr(options, name) != getattr(default, name)]
    if extra:
        raise InputError(
            f"parts of checkpoints are copied unchanged: {', '.join(extra)} cannot apply",
            hint=f"leave out {', '.join(extra)}",
        )
    return swap_parts(options)
