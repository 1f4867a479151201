"""Refuse files whose weights cannot be decoded: NF4, int8, and formats of ComfyUI other than scaled fp8."""

from __future__ import annotations

from spectune.checkpoints.scaled_fp8 import METADATA_KEY, ScaledLayers
from spectune.errors import InputError, counted, some_of
from spectune.files.source import WeightSource

# bitsandbytes: the state of 4-bit weights (absmax, quant_map, quant_state) and 8-bit weights (SCB).
_STATES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB")
_STATE_SIGNS = (".quant_state.", "bitsandbytes__")

_HINT = "use the fp16, bf16, fp32 or fp8 version of the model"


def check_plain_weights(source: WeightSource) -> None:
    """Raise InputError for weights that can only be decoded with stored scales or tables.

    `open_checkpoint` has already decoded scaled fp8. Reads names, dtypes, metadata and tensors `comfy_quant`.
    """
    states = [name for name in source.tensors if _is_state(name)]
    if states:
        raise InputError(
            f"{source.label} is quantized by bitsandbytes: {counted(len(states), 'tensor')} with "
            f"quantization state: {some_of(states)}",
            hint=_HINT,
        )
    found = ScaledLayers.of(source)
    if found.left_out or METADATA_KEY in source.metadata:
        evidence = some_of(found.left_out) if found.left_out else f"metadata {METADATA_KEY}"
        raise InputError(
            f"{source.label} is quantized, and its weights cannot be decoded: "
            + (found.problem or f"their scales are stored separately: {evidence}"),
            hint=_HINT,
        )


def _is_state(name: str) -> bool:
    return name.rpartition(".")[2] in _STATES or any(sign in name for sign in _STATE_SIGNS)
