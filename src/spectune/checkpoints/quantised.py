"""Checkpoints whose numbers mean something else without the scales stored beside them."""

from __future__ import annotations

from collections.abc import Mapping

from spectune.errors import InputError, some_of
from spectune.files.source import TensorInfo, WeightSource

# the whole file is scaled: what ComfyUI writes once for a model
_MARKERS = ("scaled_fp8", "comfy_quant")
_SCALES = ("scale_weight", "weight_scale", "weight_scale_2", "scale_input", "input_scale")
# bitsandbytes: state of 4-bit (absmax, quant_map, quant_state) and of 8-bit weights (SCB)
_STATES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB")
_STATE_SIGNS = (".quant_state.", "bitsandbytes__")
_METADATA_KEY = "_quantization_metadata"  # ComfyUI's table of quantised layers

WANT_PLAIN = "get the fp16, bf16 or fp32 form of the model, or its fp8 form without scales"


def check_not_quantised(source: WeightSource) -> None:
    """Raise InputError for weights that are not numbers by themselves: scaled fp8, NF4, int8.

    Plain fp8 is a storage type like any other and passes. Only names, types and metadata are read.
    """
    states = [name for name in source.tensors if _is_state(name)]
    if states:
        raise InputError(
            f"{source.label} is quantised by bitsandbytes: {len(states)} tensors are the state that its "
            f"weights are unpacked with: {some_of(states)}",
            hint=WANT_PLAIN,
        )
    scales = [name for name in source.tensors if _is_scale(name, source.tensors)]
    if scales or _METADATA_KEY in source.metadata:
        found = some_of(scales) if scales else f"metadata {_METADATA_KEY}"
        raise InputError(
            f"{source.label} is a scaled quantised checkpoint: its weights must be multiplied by factors "
            f"that it stores apart: {found}",
            hint=WANT_PLAIN,
        )


def _is_state(name: str) -> bool:
    return name.rpartition(".")[2] in _STATES or any(sign in name for sign in _STATE_SIGNS)


def _is_scale(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    stem, _, last = name.rpartition(".")
    if last in _MARKERS:
        return True
    weight = tensors.get(f"{stem}.weight" if stem else "weight")
    return last in _SCALES and weight is not None and weight.dtype.itemsize == 1
