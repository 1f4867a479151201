"""Slice: parts of adapters, or of checkpoints, combined into one file."""

from __future__ import annotations

from spectune.errors import InputError
from spectune.operation import operation
from spectune.ops.options.adapter_files import SliceOptions
from spectune.ops.shared import is_checkpoint
from spectune.ops.slice.adapters import SliceReport, slice_adapters
from spectune.ops.slice.parts import SwapReport, swap_parts


@operation(SliceOptions)
def slice(options: SliceOptions) -> SliceReport | SwapReport:
    """Combine parts of files: "style.safetensors:unet:0.8", "face.safetensors:te".

    Of adapters, layers by trait (te, unet, content, style, a block, a pattern, a name in the JSON file
    `traits`), summed where they overlap. Of checkpoints, whole parts (unet, te1, te2, vae).
    """
    if not options.slices:
        raise InputError("no files to combine", hint="name files like style.safetensors:te")
    whole = {path: is_checkpoint(path) for path in dict.fromkeys(piece.path for piece in options.slices)}
    if len(set(whole.values())) > 1:
        model, adapter = (next(path.name for path in whole if whole[path] is kind) for kind in (True, False))
        raise InputError(
            f"{model} is a checkpoint and {adapter} an adapter: expected files of one kind",
            hint="`spectune rebuild` puts an adapter into a checkpoint",
        )
    if not all(whole.values()):
        return slice_adapters(options)
    default = SliceOptions(options.slices, options.out)
    names = ("traits", "base", "keys", "dtype", "overlap")
    given = [f"`{name}`" for name in names if getattr(options, name) != getattr(default, name)]
    if given:
        raise InputError(
            f"parts of checkpoints are copied unchanged: {', '.join(given)} cannot apply",
            hint=f"leave out {', '.join(given)}",
        )
    return swap_parts(options)
