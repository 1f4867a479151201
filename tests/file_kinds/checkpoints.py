"""Small checkpoints of every kind, changed from the base in one layer: `export` finds a difference."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from spectune.checkpoints.open import open_checkpoint, open_writer
from spectune.files.writer import write_tensors
from spectune.ops.shared import write_all
from spectune.ops.split import split
from spectune.sdxl.layout import TE1_ROOT, TE1_SHORT_ROOT, TE2_ROOT, UNET_ROOT, VAE_ROOT, hints_metadata
from tests.layouts import TINY

Tensors = Mapping[str, Tensor]
Write = Callable[[Tensors, Path], Path]
FP8 = torch.float8_e4m3fn
CHANGED = f"{UNET_ROOT}middle_block.1.proj_in.weight"
CONV_IN, CONV_OUT = f"{UNET_ROOT}input_blocks.0.0.weight", f"{UNET_ROOT}out.2"


def tuned(tensors: Tensors) -> dict[str, Tensor]:
    """Change one layer by a matrix of rank 1."""
    weight = tensors[CHANGED]
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(size, generator=generator) for size in weight.shape]
    return {**tensors, CHANGED: (weight.float() + 0.01 * torch.outer(*sides)).to(weight.dtype)}


def save(tensors: Tensors, path: Path, **metadata: str) -> Path:
    write_tensors(path, dict(tensors), metadata=hints_metadata(TINY) | metadata)
    return path


def _part(tensors: Tensors, *roots: str, keep: bool = True) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if name.startswith(roots) is keep}


def _resized(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Repeat the channels of an axis up to `size`."""
    return tensor.index_select(axis, torch.arange(size) % tensor.shape[axis]).contiguous()


def _latents(tensors: Tensors, channels: int) -> dict[str, Tensor]:
    """Return the model with latents of another number of channels, and a VAE without quant convolutions."""
    made = {name: tensor for name, tensor in tensors.items() if "quant_conv" not in name}
    made[CONV_IN] = _resized(made[CONV_IN], 1, channels)
    for name in (f"{CONV_OUT}.weight", f"{CONV_OUT}.bias"):
        made[name] = _resized(made[name], 0, channels)
    for name in (f"{VAE_ROOT}encoder.conv_out.weight", f"{VAE_ROOT}encoder.conv_out.bias"):
        made[name] = _resized(made[name], 0, 2 * channels)
    name = f"{VAE_ROOT}decoder.conv_in.weight"
    return made | {name: _resized(made[name], 1, channels)}


def _averaged(tensors: Tensors) -> dict[str, Tensor]:
    unet = _part(tensors, UNET_ROOT)
    averages = {"model_ema." + name.removeprefix("model.").replace(".", ""): t for name, t in unet.items()}
    return {
        **tensors,
        **averages,
        "model_ema.decay": torch.ones(()),
        "model_ema.num_updates": torch.tensor(1),
    }


def _matrices(tensors: Tensors) -> list[str]:
    names = [name for name, t in tensors.items() if name.startswith(UNET_ROOT) and t.dim() == 2]
    return [name.removesuffix(".weight") for name in names if name.endswith(".weight")]


def _fp8(tensors: Tensors) -> dict[str, Tensor]:
    return {name: t.to(FP8) if t.is_floating_point() else t for name, t in tensors.items()}


def _scaled(tensors: Tensors, *, marker: bool) -> dict[str, Tensor]:
    """Scale the matrices of the UNet to fp8, as ComfyUI did (`marker`) and does."""
    made = {f"{UNET_ROOT}scaled_fp8": torch.zeros(2).to(FP8), **tensors} if marker else dict(tensors)
    config = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    for layer in _matrices(tensors):
        exact = tensors[f"{layer}.weight"].float()
        scale = exact.abs().max().clamp(min=1e-9) / torch.finfo(FP8).max
        made[f"{layer}.weight"] = (exact / scale).to(FP8)
        made |= {f"{layer}.scale_weight": scale} if marker else {
            f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": config.clone()
        }  # fmt: skip
    return made


def _nvfp4(tensors: Tensors) -> dict[str, Tensor]:
    config = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    made = dict(tensors)
    for layer in _matrices(tensors):
        rows, columns = tensors[f"{layer}.weight"].shape
        made[f"{layer}.weight"] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
        made |= {f"{layer}.weight_scale": torch.ones(rows, 1).to(FP8), f"{layer}.comfy_quant": config.clone()}
    return made


def _nf4(tensors: Tensors) -> dict[str, Tensor]:
    made = dict(tensors)
    for layer in _matrices(tensors):
        count = tensors[f"{layer}.weight"].numel()
        made[f"{layer}.weight"] = torch.zeros(count // 2, 1, dtype=torch.uint8)
        made[f"{layer}.weight.absmax"] = torch.zeros(max(count // 64, 1), dtype=torch.uint8)
    return made


def _single(change: Callable[[dict[str, Tensor]], Tensors]) -> Write:
    return lambda tensors, folder: save(change(tuned(tensors)), folder / "file.safetensors")


def _bytes(name: str, head: bytes) -> Write:
    def write(_: Tensors, folder: Path) -> Path:
        (folder / name).write_bytes(head + bytes(64))
        return folder / name

    return write


def _laid_out(name: str) -> Write:
    """Write shards or a diffusers folder."""

    def write(tensors: Tensors, folder: Path) -> Path:
        single = save(tuned(tensors), folder / "single.safetensors")
        with open_checkpoint(single) as source:
            infos = list(source.tensors.values())
            with open_writer(folder / name, infos, metadata=source.metadata) as writer:
                write_all(source, writer, None)
        return folder / name

    return write


def _residual(tensors: Tensors, folder: Path) -> Path:
    split(save(tensors, folder / "file.safetensors"), folder / "split", rank=2)
    return folder / "split/file.residual.safetensors"


# Each kind, and the function that writes such a file into a folder from the tensors of a complete model.
CHECKPOINTS: Mapping[str, Write] = {
    "complete": _single(dict),
    "shards with an index": _laid_out("file.safetensors.index.json"),
    "diffusers folder": _laid_out("xl"),
    "UNet only": _single(lambda t: _part(t, UNET_ROOT)),
    "UNet only, names without `model.diffusion_model.`": _single(
        lambda t: {name.removeprefix(UNET_ROOT): tensor for name, tensor in _part(t, UNET_ROOT).items()}
    ),
    "without VAE": _single(lambda t: _part(t, VAE_ROOT, keep=False)),
    "VAE without quant convolutions": _single(
        lambda t: {name: x for name, x in t.items() if "quant_conv" not in name}
    ),
    "latents of 8 channels": _single(lambda t: _latents(t, 8)),
    "latents of 16 channels": _single(lambda t: _latents(t, 16)),
    "latents of 32 channels": _single(lambda t: _latents(t, 32)),
    "inpainting (9 channels)": _single(lambda t: t | {CONV_IN: _resized(t[CONV_IN], 1, 9)}),
    "predicts v": _single(lambda t: t | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}),
    "EDM": _single(lambda t: t | {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}),
    "first encoder without `text_model.`": _single(
        lambda t: {name.replace(TE1_ROOT, TE1_SHORT_ROOT): tensor for name, tensor in t.items()}
    ),
    "`text_projection.weight` as a Linear": _single(
        lambda t: {name: x for name, x in t.items() if name != f"{TE2_ROOT}text_projection"}
        | {f"{TE2_ROOT}text_projection.weight": t[f"{TE2_ROOT}text_projection"].T.contiguous()}
    ),
    "with EMA": _single(_averaged),
    "fp8": _single(_fp8),
    "scaled fp8 (`scaled_fp8`)": _single(lambda t: _scaled(t, marker=True)),
    "scaled fp8 (`comfy_quant`)": _single(lambda t: _scaled(t, marker=False)),
    "nvfp4 (`comfy_quant`)": _single(_nvfp4),
    "NF4 (bitsandbytes)": _single(_nf4),
    "residual of `split`": _residual,
    ".ckpt": _bytes("file.ckpt", b"PK\3\4"),
    "GGUF": _bytes("file.gguf", b"GGUF"),
    "SD 1.5": _single(lambda t: {"cond_stage_model.transformer.x.weight": t[CONV_IN]}),
}  # fmt: skip
