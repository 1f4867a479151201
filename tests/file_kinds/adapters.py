"""Small adapters of every kind for the tiny model, with the keys that their programs write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from spectune.ops.split import split
from spectune.sdxl.layers import Catalogue, Layer
from tests.file_kinds.checkpoints import CHANGED, save
from tests.sample_adapters import as_tuned, kohya_style, pairs, renamed

Tensors = dict[str, Tensor]
Write = Callable[["Model", Path], Path]


class Model:
    """The base that the adapters are for."""

    def __init__(self, tensors: Mapping[str, Tensor], catalogue: Catalogue) -> None:
        self.tensors = tensors
        self.linear = next(layer for layer in catalogue if layer.tensor == CHANGED)
        self.conv = next(layer for layer in catalogue if layer.name == "unet.input_blocks.1.0.in_layers.2")
        self.attention = [layer for layer in catalogue if layer.block == self.linear.block and layer.default]


def _small(*shape: int) -> Tensor:
    return 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _keys(layer: Layer, *, alpha: float | None = 2.0, **tensors: Tensor) -> Tensors:
    made = {f"{layer.kohya}.{name.replace('__', '.')}": tensor for name, tensor in tensors.items()}
    return made if alpha is None else made | {f"{layer.kohya}.alpha": torch.tensor(alpha)}


def _sides(model: Model) -> tuple[int, int]:
    return model.linear.shape[0], model.linear.shape[1]


def _spelled(*spelling: str) -> Callable[[Model], Tensors]:
    """Rename a kohya file: separator of the stem, names of down and up."""
    prefix, down, up = spelling

    def make(model: Model) -> Tensors:
        made: Tensors = {}
        for layer in model.attention:
            for key, tensor in pairs([layer]).items():
                suffix = key.removeprefix(f"{layer.kohya}.").replace("lora_down", down).replace("lora_up", up)
                name = layer.diffusers.partition(".")[2] if prefix != "diffusion_model." else layer.name[5:]
                if suffix != "alpha" or down == "lora_down":
                    made[f"{prefix}{name}.{suffix}"] = tensor
        return made

    return make


def _locon_mid(model: Model) -> Tensors:
    out, inputs, height, width = model.conv.shape
    return _keys(model.conv, lora_down__weight=_small(2, inputs, 1, 1), lora_up__weight=_small(out, 2, 1, 1),
                 lora_mid__weight=_small(2, 2, height, width))  # fmt: skip


def _loha(model: Model) -> Tensors:
    out, inputs = _sides(model)
    return _keys(model.linear, hada_w1_a=_small(out, 2), hada_w1_b=_small(2, inputs),
                 hada_w2_a=_small(out, 2) + 0.1, hada_w2_b=_small(2, inputs) + 0.1)  # fmt: skip


def _lokr(model: Model) -> Tensors:
    out, inputs = _sides(model)
    return _keys(model.linear, lokr_w1=_small(2, 2), lokr_w2=_small(out // 2, inputs // 2))


def _dora(model: Model) -> Tensors:
    magnitude = 1.1 * model.tensors[CHANGED].float().norm(dim=1, keepdim=True)
    return pairs([model.linear]) | {f"{model.linear.kohya}.dora_scale": magnitude}


def _full(model: Model) -> Tensors:
    out, _ = _sides(model)
    norm = f"lora_unet_{CHANGED.split('.')[2]}_1_norm"
    return _keys(model.linear, alpha=None, diff=_small(*_sides(model)), diff_b=_small(out)) | {
        f"{norm}.w_norm": _small(out), f"{norm}.b_norm": _small(out)
    }  # fmt: skip


def _oft(model: Model) -> Tensors:
    blocks = 4
    size = model.linear.shape[0] // blocks
    return _keys(model.linear, alpha=0.01, oft_blocks=_small(blocks, size, size))


def _rank_zero(model: Model) -> Tensors:
    out, inputs = _sides(model)
    return _keys(model.linear, lora_down__weight=torch.empty(0, inputs), lora_up__weight=torch.empty(out, 0))


def _file(make: Callable[[Model], Tensors]) -> Write:
    def write(model: Model, folder: Path) -> Path:
        path = folder / "file.safetensors"
        save_file({key: tensor.clone().contiguous() for key, tensor in make(model).items()}, path)
        return path

    return write


def _principal(model: Model, folder: Path) -> Path:
    split(save(model.tensors, folder / "file.safetensors"), folder / "split", rank=2)
    return folder / "split/file.principal-r2.safetensors"


def _diffusers_stems(model: Model) -> Tensors:
    tensors = pairs(model.attention)
    for layer in model.attention:
        tensors = renamed(tensors, layer.kohya, kohya_style(layer))
    return tensors


ADAPTERS: Mapping[str, Write] = {
    "LoRA, kohya": _file(lambda model: pairs(model.attention)),
    "LoRA, kohya with diffusers names": _file(_diffusers_stems),
    "LoRA, diffusers or PEFT": _file(_spelled("unet.", "lora_A", "lora_B")),
    "LoRA, ComfyUI": _file(_spelled("diffusion_model.", "lora_down", "lora_up")),
    "LoRA of convolutions (LoCon)": _file(lambda model: pairs([model.conv])),
    "LoCon with `lora_mid`": _file(_locon_mid),
    "LoHa": _file(_loha),
    "LoKr": _file(_lokr),
    "DoRA": _file(_dora),
    "full matrices, biases and norms": _file(_full),
    "OFT": _file(_oft),
    "rank 0": _file(_rank_zero),
    "tuned adapter of `train`": _file(lambda model: as_tuned(pairs(model.attention))),
    "principal of `split`": _principal,
    "LoRA of SD 1": _file(
        lambda model: renamed(pairs([model.linear]), model.linear.kohya, "lora_te_text_model_layers_0_fc1")
    ),
    "LoRA of Flux": _file(
        lambda model: renamed(pairs([model.linear]), model.linear.kohya, "lora_unet_double_blocks_0_img_mod")
    ),
}  # fmt: skip
