"""Decode scaled fp8, and refuse other quantized weights: NF4, int8, and other formats of ComfyUI."""

from __future__ import annotations

import warnings

from spectune.checkpoints.scaled_fp8 import ScaledLayers, note, with_scales_applied
from spectune.errors import FileNote, InputError, counted, some_of
from spectune.files.reader import Checkpoint

# bitsandbytes: the state of 4-bit weights (absmax, quant_map, quant_state) and 8-bit weights (SCB).
_STATES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB")
_STATE_SIGNS = (".quant_state.", "bitsandbytes__")

_HINT = "use the fp16, bf16, fp32 or fp8 version of the model"


def with_plain_weights(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with plain weights: itself, or scaled fp8 decoded, which warns with a FileNote.

    Raises InputError for weights that are quantized in another way.
    """
    states = [name for name in checkpoint.tensors if _is_state(name)]
    if states:
        raise InputError(
            f"{checkpoint.label} is quantized by bitsandbytes: {counted(len(states), 'tensor')} with "
            f"quantization state: {some_of(states)}",
            hint=_HINT,
        )
    found = ScaledLayers.of(checkpoint)
    if found.problem:
        raise InputError(
            f"{checkpoint.label} is quantized, and its weights cannot be decoded: {found.problem}", hint=_HINT
        )
    if not found.left_out:
        return checkpoint
    plain = with_scales_applied(checkpoint, found)
    warnings.warn(note(plain, found), FileNote, stacklevel=3)
    return plain


def _is_state(name: str) -> bool:
    return name.rpartition(".")[2] in _STATES or any(sign in name for sign in _STATE_SIGNS)
