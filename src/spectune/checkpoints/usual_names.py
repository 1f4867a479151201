"""Give the tensors of a checkpoint the names of a single file, whichever spelling the file has.

| spelling in the file | written by |
| --- | --- |
| `input_blocks.0.0.weight`: a UNet without `model.diffusion_model.` | programs that save a UNet alone |
| `conditioner.embedders.0.transformer.encoder...`: without `text_model.` | transformers from 5.6 |
| `conditioner.embedders.1.model.text_projection.weight`: a Linear, (out, in) | conversion scripts |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from spectune.errors import InputError, some_of
from spectune.files.reader import Checkpoint
from spectune.files.source import RenamedFiles, RenamedTensor, TensorInfo
from spectune.sdxl.layout import TE1_ROOT, TE1_SHORT_ROOT, TE2_ROOT, UNET_ROOT

_UNET_BLOCKS = ("input_blocks.", "middle_block.", "output_blocks.", "out.", "time_embed.", "label_emb.")
_UNET_SIGN = "label_emb.0.0.weight"  # no other UNet has it: SD 1 and 2 have no `label_emb`
_CLIP_MODULES = ("embeddings.", "encoder.", "final_layer_norm.")
_PROJECTION = f"{TE2_ROOT}text_projection"  # used as x @ P; a Linear stores the transpose


def with_usual_names(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the names of a single file; the same object if it has them already.

    Raises InputError if two tensors would get one name.
    """
    names = _usual_names(checkpoint.tensors)
    if all(name == usual for name, usual in names.items()):
        return checkpoint
    entries: dict[str, RenamedTensor] = {}
    for name, usual in names.items():
        if usual in entries:
            raise InputError(
                f"{checkpoint.label} has a tensor in two spellings: {some_of([usual, name])}",
                hint="remove one of the two from the file",
            )
        transposed = name == f"{_PROJECTION}.weight" and usual == _PROJECTION
        info, load = checkpoint.tensors[name], partial(checkpoint.load, name)
        shape = info.shape[::-1] if transposed else info.shape
        load = partial(_transposed, load) if transposed else load
        entries[usual] = RenamedTensor(replace(info, name=usual, shape=shape), load)
    file_names = {usual: name for name, usual in names.items() if name != usual}
    return Checkpoint(
        checkpoint.path,
        [RenamedFiles(entries, [checkpoint])],
        checkpoint.metadata,
        label=checkpoint.label,
        file_names=file_names,
    )


def _usual_names(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Return the usual name of each tensor of a file."""
    bare_unet = _UNET_SIGN in tensors and f"{UNET_ROOT}{_UNET_SIGN}" not in tensors
    linear_projection = f"{_PROJECTION}.weight" in tensors and _PROJECTION not in tensors

    def usual(name: str) -> str:
        if bare_unet and name.startswith(_UNET_BLOCKS):
            return f"{UNET_ROOT}{name}"
        if name.startswith(TE1_SHORT_ROOT):
            rest = name.removeprefix(TE1_SHORT_ROOT)
            return f"{TE1_ROOT}{rest}" if rest.startswith(_CLIP_MODULES) else name
        return _PROJECTION if linear_projection and name == f"{_PROJECTION}.weight" else name

    return {name: usual(name) for name in tensors}


def _transposed(load: Callable[[], Tensor]) -> Tensor:
    return load().T.contiguous()
