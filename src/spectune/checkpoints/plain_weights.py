"""Refuse files whose weights cannot be read without stored scales: scaled fp8, NF4, int8."""

from __future__ import annotations

from collections.abc import Mapping

from spectune.errors import InputError, counted, some_of
from spectune.files.source import TensorInfo, WeightSource

# ComfyUI writes one marker per model.
_MARKERS = ("scaled_fp8", "comfy_quant")
_SCALES = ("scale_weight", "weight_scale", "weight_scale_2", "scale_input", "input_scale")
# bitsandbytes: the state of 4-bit weights (absmax, quant_map, quant_state) and 8-bit weights (SCB).
_STATES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB")
_STATE_SIGNS = (".quant_state.", "bitsandbytes__")
_METADATA_KEY = "_quantization_metadata"  # ComfyUI's table of quantized layers

_HINT = "use the fp16, bf16 or fp32 version of the model, or its fp8 version without scales"


def check_plain_weights(source: WeightSource) -> None:
    """Raise InputError for weights that can only be decoded with stored scales or tables.

    Plain fp8 is allowed. Reads only names, dtypes and metadata.
    """
    states = [name for name in source.tensors if _is_state(name)]
    if states:
        raise InputError(
            f"{source.label} is quantized by bitsandbytes: {counted(len(states), 'tensor')} with "
            f"quantization state: {some_of(states)}",
            hint=_HINT,
        )
    scales = [name for name in source.tensors if _is_scale(name, source.tensors)]
    if scales or _METADATA_KEY in source.metadata:
        evidence = some_of(scales) if scales else f"metadata {_METADATA_KEY}"
        raise InputError(
            f"{source.label} is a scaled quantized checkpoint: its weights must be multiplied by "
            f"separately stored scales: {evidence}",
            hint=_HINT,
        )


def _is_state(name: str) -> bool:
    return name.rpartition(".")[2] in _STATES or any(sign in name for sign in _STATE_SIGNS)


def _is_scale(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    stem, _, last = name.rpartition(".")
    if last in _MARKERS:
        return True
    weight = tensors.get(f"{stem}.weight" if stem else "weight")
    return last in _SCALES and weight is not None and weight.dtype.itemsize == 1
