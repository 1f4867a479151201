"""Read scaled fp8 checkpoints as plain ones: every weight is multiplied by the scale stored beside it.

| beside `X.weight` | content |
| --- | --- |
| `X.scale_weight`, with a tensor `scaled_fp8` in the file | its scale, as ComfyUI wrote it until 2025 |
| `X.weight_scale`, with `X.comfy_quant` or `_quantization_metadata` | its scale, as ComfyUI writes it |
| `X.scale_input`, `X.input_scale` | a scale of activations, which changes no weight |

A scale has one value, or one per row of the weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from spectune.core.rounding import dtype_name, rounded
from spectune.errors import counted, printable, some_of
from spectune.files.provenance import parse_json
from spectune.files.reader import Checkpoint
from spectune.files.source import RenamedFiles, RenamedTensor, TensorInfo, WeightSource
from spectune.sdxl.layout import UNET_ROOT

_METADATA_KEY = "_quantization_metadata"  # ComfyUI's table of quantized layers, as JSON
_MARKERS = ("scaled_fp8", "comfy_quant")
_SCALES = ("scale_weight", "weight_scale")
_INPUT_SCALES = ("scale_input", "input_scale")
_OTHER_SCALES = ("weight_scale_2", "pre_quant_scale")  # of formats with two scales, such as nvfp4
_FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
_MAX_CONFIG_BYTES = 4096  # of one `comfy_quant`; ComfyUI writes about 50


@dataclass(frozen=True)
class ScaledLayers:
    """What a file holds beside its weights to decode them; empty for a plain file."""

    scales: Mapping[str, str]  # name of the weight -> name of its scale
    dtypes: Mapping[str, torch.dtype]  # name of the weight -> fp8 type of its bytes
    left_out: tuple[str, ...]  # all scales and markers; a file that has one is not plain
    problem: str = ""  # why the weights cannot be decoded; empty if they can

    @classmethod
    def of(cls, source: WeightSource) -> ScaledLayers:
        tensors, formats = source.tensors, _declared_formats(source)
        scales: dict[str, str] = {}
        left_out: list[str] = []
        problems = _unknown_formats(formats)
        for name in tensors:
            stem, _, last = name.rpartition(".")
            weight = f"{stem}.weight"
            if last not in _MARKERS and (weight not in tensors or tensors[weight].dtype.itemsize > 1):
                continue  # no scale, or one that has nothing to decode
            if last in (*_MARKERS, *_SCALES, *_INPUT_SCALES, *_OTHER_SCALES):
                left_out.append(name)
            if last in _OTHER_SCALES or (last in _SCALES and weight in scales):
                problems.append(f"{weight} has more than one scale: {name}")
            elif last in _SCALES:
                scales[weight] = name
        dtypes = {weight: _fp8_type(tensors[weight], formats.get(weight)) for weight in scales}
        problems += [f"{weight} is declared as {kind}, but has no scale"
                     for weight, kind in formats.items() if weight not in scales]  # fmt: skip
        problems += [_misfit(tensors[scale], tensors[weight]) for weight, scale in scales.items()]
        problems += [f"{weight} has a scale, but is stored in {dtype_name(tensors[weight].dtype)}"
                     for weight, dtype in dtypes.items() if dtype not in _FORMATS.values()]  # fmt: skip
        return cls(scales, dtypes, tuple(left_out), next(filter(None, problems), ""))


def with_scales_applied(checkpoint: Checkpoint, found: ScaledLayers) -> Checkpoint:
    """Return the checkpoint with decoded weights and without scales.

    A decoded weight has the 16-bit dtype of most other values of the file, or SDXL's float16.
    """
    store = _main_dtype(checkpoint.tensors)
    entries: dict[str, RenamedTensor] = {}
    for name, info in checkpoint.tensors.items():
        load = partial(checkpoint.load, name)
        if name in found.scales:
            load_scale = partial(checkpoint.load, found.scales[name])
            load = partial(_decoded, name, load, load_scale, found.dtypes[name], store)
            info = replace(info, dtype=store)
        if name not in found.left_out:
            entries[name] = RenamedTensor(info, load)
    metadata = {key: text for key, text in checkpoint.metadata.items() if key != _METADATA_KEY}
    files = [RenamedFiles(entries, [checkpoint])]
    return Checkpoint(checkpoint.path, files, metadata, label=checkpoint.label)


def note(plain: Checkpoint, found: ScaledLayers) -> str:
    """Return what was done to the file, for the user."""
    stores = {dtype_name(plain.tensors[weight].dtype) for weight in found.scales}
    read_as = f"{plain.label} is scaled fp8: weights multiplied by their scales and read as "
    inputs = sum(name.endswith(_INPUT_SCALES) for name in found.left_out)
    return (
        f"{read_as}{', '.join(stores) or 'stored'}: {len(found.scales):,}; scales and markers left out: "
        f"{len(found.left_out):,}" + (f", {inputs:,} of them for activations" if inputs else "")
    )


def _declared_formats(source: WeightSource) -> dict[str, str]:
    """Return the format of each quantized weight that the file declares, by the name of the weight."""
    table = parse_json(source.metadata.get(_METADATA_KEY, "{}"))
    table = cast("dict[str, object]", table) if isinstance(table, dict) else {}
    layers = table.get("layers", table)  # some converters leave out the outer level
    configs: dict[str, object] = {}
    for layer, config in cast("dict[str, object]", layers).items() if isinstance(layers, dict) else ():
        named = (f"{root}{layer}.weight" for root in ("", UNET_ROOT))
        configs |= {weight: config for weight in named if weight in source.tensors}
    for name, info in source.tensors.items():
        if name.endswith(".comfy_quant"):
            small = info.dtype == torch.uint8 and info.nbytes <= _MAX_CONFIG_BYTES
            text = source.load(name).numpy().tobytes().decode(errors="replace") if small else ""
            configs[f"{name.removesuffix('comfy_quant')}weight"] = parse_json(text)
    return {weight: _format_of(config) for weight, config in configs.items()}


def _format_of(config: object) -> str:
    kind = cast("dict[str, object]", config).get("format") if isinstance(config, dict) else config
    return kind if isinstance(kind, str) else "an unknown format"


def _unknown_formats(formats: Mapping[str, str]) -> list[str]:
    others = Counter(kind for kind in formats.values() if kind not in _FORMATS)
    named = some_of([f"{counted(count, 'layer')} in {printable(kind, 40)}" for kind, count in others.items()])
    return [f"it is quantized in another format than fp8: {named}"] if others else []


def _fp8_type(weight: TensorInfo, declared: str | None) -> torch.dtype:
    """Return the type of the bytes of a weight: the declared one if they are stored as bare bytes."""
    return _FORMATS.get(declared or "", weight.dtype) if weight.dtype == torch.uint8 else weight.dtype


def _misfit(scale: TensorInfo, weight: TensorInfo) -> str:
    rows = weight.shape[0] if weight.shape else 1
    if scale.numel not in (1, rows) or (scale.numel > 1 and scale.shape[0] != rows):
        return f"{scale.name} has shape {scale.shape}, expected one value, or one per row of {weight.shape}"
    return "" if scale.dtype.is_floating_point else f"{scale.name} is stored in {dtype_name(scale.dtype)}"


def _main_dtype(tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    halves = Counter({torch.float16: 0})
    for info in tensors.values():
        if info.dtype in (torch.float16, torch.bfloat16):
            halves[info.dtype] += info.numel
    return halves.most_common(1)[0][0]


def _decoded(
    name: str,
    load: Callable[[], Tensor],
    load_scale: Callable[[], Tensor],
    fp8: torch.dtype,
    store: torch.dtype,
) -> Tensor:
    weight, scale = load().view(fp8).float(), load_scale().float()
    # float32: a scale has more digits than 16 bits hold, and small ones underflow in float16
    exact = weight.mul_(scale.view(-1, *[1] * (weight.dim() - 1)) if scale.numel() > 1 else scale.view(()))
    return rounded(exact, store, name, hint="its scale is too large: download the file again")
