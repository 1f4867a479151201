"""The names of SDXL's modules and tensors in every program: one table per part, generated from the layout.

As an example, the linear projection before the first transformer of level 1:

| where | name |
| --- | --- |
| spectune, `Layer.name` | `unet.input_blocks.4.1.proj_in` |
| single file (sgm) | `model.diffusion_model.input_blocks.4.1.proj_in.weight` |
| diffusers module, PEFT adapter | `unet.down_blocks.1.attentions.0.proj_in` |
| kohya, LyCORIS adapter | `lora_unet_input_blocks_4_1_proj_in.lora_down.weight` |
| trainer that uses diffusers' UNet | `lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight` |
| ComfyUI adapter | `diffusion_model.input_blocks.4.1.proj_in.lora_down.weight` |

`diffusers_name`, `kohya_stem` and `comfyui_name` return the name of a layer in a program. `modules_of` lists
all modules of a part with their tensors. Names of other programs are looked up in these tables and never
parsed, because an underscore in a kohya key can mean a dot or an underscore.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from types import MappingProxyType

from torch import Tensor

from spectune.files.source import WeightSource
from spectune.sdxl.layout import (
    TE1_ROOT,
    TE2_ROOT,
    UNET_ROOT,
    VAE_ROOT,
    PartLayouts,
    PartName,
    TextLayout,
    UNetLayout,
    VaeLayout,
)

# The names of the parts in ComfyUI, as in its adapters.
COMFYUI_PARTS: Mapping[str, str] = {
    "unet": "diffusion_model",
    "te1": "text_encoders.clip_l.transformer",
    "te2": "text_encoders.clip_g.transformer",
}


class Part(StrEnum):
    """The parts with layers that can be factored."""

    UNET = "unet"
    TE1 = "te1"
    TE2 = "te2"


class Factoring(StrEnum):
    """Whether spectune factors the weight of a module."""

    DEFAULT = "default"  # yes: LyCORIS preset=full trains it too
    ON_REQUEST = "on_request"  # if a layer pattern selects it
    NEVER = "never"


@dataclass(frozen=True)
class TensorView:
    """A parameter of a running module as a view of a tensor of the single file."""

    tensor: str
    rows: tuple[int, int] | None = None  # of a fused tensor: first row, one past the last
    transpose: bool = False
    squeeze: bool = False  # whether it is a 1x1 convolution in the file and a matrix in the module

    def read(self, tensor: Tensor) -> Tensor:
        """Return the module's parameter as a view of the file's tensor."""
        if self.rows is not None:
            tensor = tensor[self.rows[0] : self.rows[1]]
        if self.transpose:
            tensor = tensor.T
        # a few programs write the attention of the VAE as matrices
        return tensor.flatten(1) if self.squeeze and tensor.ndim > 1 else tensor

    def load(self, source: WeightSource) -> Tensor:
        return self.read(source.load(self.tensor))

    def written(self, parameter: Tensor) -> Tensor:
        """Return the file's tensor, or its block of rows, from a parameter; the inverse of `read`."""
        if self.squeeze and parameter.ndim == 2:
            parameter = parameter[:, :, None, None]
        return parameter.T if self.transpose else parameter


@dataclass(frozen=True)
class Module:
    """A module with parameters: its name in spectune, its path in the running model, and its tensors."""

    layer: str  # "unet.input_blocks.4.1.proj_in"
    path: str  # "down_blocks.1.attentions.0.proj_in"
    block: str  # "down.1"
    factoring: Factoring
    parameters: tuple[tuple[str, TensorView], ...]  # ("weight", view), ("bias", view)

    @property
    def weight(self) -> TensorView:
        return self.parameters[0][1]

    @property
    def axes(self) -> int:
        """The number of axes of the weight, if it can be factored."""
        return 4 if self.path.rpartition(".")[2].startswith("conv") else 2

    @property
    def default(self) -> bool:
        """Whether LyCORIS preset=full trains it."""
        return self.factoring is Factoring.DEFAULT

    @property
    def factorable(self) -> bool:
        return self.factoring is not Factoring.NEVER


def kohya_stem(name: str) -> str:
    """Return the stem of a layer's keys in kohya adapters: `lora_unet_input_blocks_4_1_proj_in`.

    `name` is the layer's name, or its diffusers name for trainers that use the diffusers UNet.
    """
    return "lora_" + name.replace(".", "_")


def comfyui_name(layer_name: str) -> str:
    """Return the name of a layer in ComfyUI's adapters: `diffusion_model.input_blocks.4.1.proj_in`."""
    part, _, rest = layer_name.partition(".")
    return f"{COMFYUI_PARTS[part]}.{rest}"


def diffusers_name(layer_name: str, unet: UNetLayout) -> str:
    """Return the name of a layer in a diffusers pipeline: `unet.down_blocks.1.attentions.0.proj_in`.

    Names of text encoders contain `text_model.`, as in files; `module_path` returns the path in memory.
    """
    part, _, rest = layer_name.partition(".")
    if part == "unet":
        return f"unet.{_unet_paths(unet)[layer_name]}"
    return f"{ {'te1': 'text_encoder', 'te2': 'text_encoder_2'}[part] }.{rest}"


def module_path(layer_name: str, unet: UNetLayout) -> tuple[Part, str]:
    """Return the part of a layer and its path in the running module of that part."""
    part, _, rest = layer_name.partition(".")
    if part == "unet":
        return Part.UNET, _unet_paths(unet)[layer_name]
    # transformers 5 drops `text_model.` from CLIPTextModel in memory, not from CLIPTextModelWithProjection.
    return Part(part), rest.removeprefix("text_model.") if part == "te1" else rest


@cache
def _unet_paths(unet: UNetLayout) -> Mapping[str, str]:
    return MappingProxyType({module.layer: module.path for module in unet_modules(unet)})


def modules_of(layout: PartLayouts, part: PartName) -> tuple[Module, ...]:
    """Return the table of one part; empty for a part that the checkpoint lacks."""
    match part:
        case "unet":
            return tuple(unet_modules(layout.unet))
        case "te1":
            return () if layout.te1 is None else tuple(te1_modules(layout.te1))
        case "te2":
            return () if layout.te2 is None else tuple(te2_modules(layout.te2))
        case "vae":
            return () if layout.vae is None else tuple(vae_modules(layout.vae))


def unet_modules(unet: UNetLayout) -> Iterator[Module]:
    """Yield the modules of the UNet; sgm numbers all blocks in sequence, diffusers per level and kind."""
    levels, per_level = len(unet.channels), unet.resnets + 1
    yield _unet_module("time_embed.0", "time_embedding.linear_1", "embed", factoring=Factoring.ON_REQUEST)
    yield _unet_module("time_embed.2", "time_embedding.linear_2", "embed", factoring=Factoring.ON_REQUEST)
    yield _unet_module("label_emb.0.0", "add_embedding.linear_1", "embed", factoring=Factoring.ON_REQUEST)
    yield _unet_module("label_emb.0.2", "add_embedding.linear_2", "embed", factoring=Factoring.ON_REQUEST)
    yield _unet_module("input_blocks.0.0", "conv_in", "embed", factoring=Factoring.ON_REQUEST)
    for level, depth in enumerate(unet.depths):
        block, path = f"down.{level}", f"down_blocks.{level}"
        grows = level > 0 and unet.channels[level] != unet.channels[level - 1]
        for n in range(unet.resnets):
            at = f"input_blocks.{1 + level * per_level + n}"
            yield from _resnet(f"{at}.0", f"{path}.resnets.{n}", block, shortcut=grows and n == 0)
            yield from _transformer(f"{at}.1", f"{path}.attentions.{n}", block, depth)
        if level < levels - 1:
            yield _unet_module(
                f"input_blocks.{(level + 1) * per_level}.0.op", f"{path}.downsamplers.0.conv", block
            )
    yield from _resnet("middle_block.0", "mid_block.resnets.0", "mid", shortcut=False)
    yield from _transformer("middle_block.1", "mid_block.attentions.0", "mid", unet.mid_depth)
    yield from _resnet("middle_block.2", "mid_block.resnets.1", "mid", shortcut=False)
    for level, depth in enumerate(reversed(unet.depths)):
        block, path = f"up.{level}", f"up_blocks.{level}"
        for n in range(per_level):
            at = f"output_blocks.{level * per_level + n}"
            yield from _resnet(f"{at}.0", f"{path}.resnets.{n}", block, shortcut=True)
            yield from _transformer(f"{at}.1", f"{path}.attentions.{n}", block, depth)
        if level < levels - 1:
            last = f"output_blocks.{level * per_level + unet.resnets}"
            yield _unet_module(f"{last}.{2 if depth else 1}.conv", f"{path}.upsamplers.0.conv", block)
    yield _unet_module("out.0", "conv_norm_out", "embed", factoring=Factoring.NEVER)
    yield _unet_module("out.2", "conv_out", "embed", factoring=Factoring.ON_REQUEST)


def _unet_module(
    name: str, path: str, block: str, *, factoring: Factoring = Factoring.DEFAULT, bias: bool = True
) -> Module:
    parameters = ("weight", "bias") if bias else ("weight",)
    views = tuple((parameter, TensorView(f"{UNET_ROOT}{name}.{parameter}")) for parameter in parameters)
    return Module(f"unet.{name}", path, block, factoring, views)


def _resnet(name: str, path: str, block: str, *, shortcut: bool) -> Iterator[Module]:
    yield _unet_module(f"{name}.in_layers.0", f"{path}.norm1", block, factoring=Factoring.NEVER)
    yield _unet_module(f"{name}.in_layers.2", f"{path}.conv1", block)
    yield _unet_module(f"{name}.emb_layers.1", f"{path}.time_emb_proj", block)
    yield _unet_module(f"{name}.out_layers.0", f"{path}.norm2", block, factoring=Factoring.NEVER)
    yield _unet_module(f"{name}.out_layers.3", f"{path}.conv2", block)
    if shortcut:
        yield _unet_module(f"{name}.skip_connection", f"{path}.conv_shortcut", block)


def _transformer(name: str, path: str, block: str, depth: int) -> Iterator[Module]:
    """Yield `depth` transformer blocks with their projections, or nothing at depth 0."""
    if not depth:
        return
    yield _unet_module(f"{name}.norm", f"{path}.norm", block, factoring=Factoring.NEVER)
    yield _unet_module(f"{name}.proj_in", f"{path}.proj_in", block)
    for n in range(depth):
        inner, inner_path = f"{name}.transformer_blocks.{n}", f"{path}.transformer_blocks.{n}"
        for attention in ("attn1", "attn2"):
            for axis in ("to_q", "to_k", "to_v"):
                yield _unet_module(
                    f"{inner}.{attention}.{axis}", f"{inner_path}.{attention}.{axis}", block, bias=False
                )
            yield _unet_module(f"{inner}.{attention}.to_out.0", f"{inner_path}.{attention}.to_out.0", block)
        for linear in ("ff.net.0.proj", "ff.net.2"):
            yield _unet_module(f"{inner}.{linear}", f"{inner_path}.{linear}", block)
        for norm in ("norm1", "norm2", "norm3"):
            yield _unet_module(f"{inner}.{norm}", f"{inner_path}.{norm}", block, factoring=Factoring.NEVER)
    yield _unet_module(f"{name}.proj_out", f"{path}.proj_out", block)


def te1_modules(text: TextLayout) -> Iterator[Module]:
    """Yield the modules of the first encoder."""

    def module(
        path: str, block: str, factoring: Factoring, parameters: tuple[str, ...] = ("weight", "bias")
    ) -> Module:
        views = tuple((parameter, TensorView(f"{TE1_ROOT}{path}.{parameter}")) for parameter in parameters)
        return Module(f"te1.text_model.{path}", path, block, factoring, views)

    yield module("embeddings.token_embedding", "te1.embed", Factoring.NEVER, ("weight",))
    yield module("embeddings.position_embedding", "te1.embed", Factoring.NEVER, ("weight",))
    for n in range(text.layers):
        for linear in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
            yield module(f"encoder.layers.{n}.{linear}", f"te1.{n}", Factoring.DEFAULT)
        for linear in ("mlp.fc1", "mlp.fc2"):
            yield module(f"encoder.layers.{n}.{linear}", f"te1.{n}", Factoring.DEFAULT)
        for norm in ("layer_norm1", "layer_norm2"):
            yield module(f"encoder.layers.{n}.{norm}", f"te1.{n}", Factoring.NEVER)
    yield module("final_layer_norm", "te1.embed", Factoring.NEVER)


def te2_modules(text: TextLayout) -> Iterator[Module]:
    """Yield the modules of the second encoder; the file has OpenCLIP's names and fused q, k, v."""

    def module(path: str, block: str, factoring: Factoring, **views: TensorView) -> Module:
        return Module(f"te2.{path}", path, block, factoring, tuple(views.items()))

    def plain(path: str, name: str, block: str, factoring: Factoring) -> Module:
        weight, bias = TensorView(f"{TE2_ROOT}{name}.weight"), TensorView(f"{TE2_ROOT}{name}.bias")
        return module(path, block, factoring, weight=weight, bias=bias)

    token = TensorView(f"{TE2_ROOT}token_embedding.weight")
    position = TensorView(f"{TE2_ROOT}positional_embedding")
    projection = TensorView(f"{TE2_ROOT}text_projection", transpose=True)
    yield module("text_model.embeddings.token_embedding", "te2.embed", Factoring.NEVER, weight=token)
    yield module("text_model.embeddings.position_embedding", "te2.embed", Factoring.NEVER, weight=position)
    for n in range(text.layers):
        path, name, block = f"text_model.encoder.layers.{n}", f"transformer.resblocks.{n}", f"te2.{n}"
        for index, axis in enumerate("qkv"):
            rows = (index * text.width, (index + 1) * text.width)
            weight = TensorView(f"{TE2_ROOT}{name}.attn.in_proj_weight", rows=rows)
            bias = TensorView(f"{TE2_ROOT}{name}.attn.in_proj_bias", rows=rows)
            yield module(f"{path}.self_attn.{axis}_proj", block, Factoring.DEFAULT, weight=weight, bias=bias)
        yield plain(f"{path}.self_attn.out_proj", f"{name}.attn.out_proj", block, Factoring.DEFAULT)
        yield plain(f"{path}.mlp.fc1", f"{name}.mlp.c_fc", block, Factoring.DEFAULT)
        yield plain(f"{path}.mlp.fc2", f"{name}.mlp.c_proj", block, Factoring.DEFAULT)
        yield plain(f"{path}.layer_norm1", f"{name}.ln_1", block, Factoring.NEVER)
        yield plain(f"{path}.layer_norm2", f"{name}.ln_2", block, Factoring.NEVER)
    yield plain("text_model.final_layer_norm", "ln_final", "te2.embed", Factoring.NEVER)
    yield module("text_projection", "te2.embed", Factoring.NEVER, weight=projection)


def vae_modules(vae: VaeLayout) -> Iterator[Module]:
    """Yield the modules of the VAE; sgm and diffusers number the decoder's levels in opposite order."""
    top = len(vae.channels) - 1
    yield _vae_module("encoder.conv_in", "encoder.conv_in")
    for level, channels in enumerate(vae.channels):
        name, path = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        grows = level > 0 and channels != vae.channels[level - 1]
        for n in range(vae.resnets):
            yield from _vae_resnet(f"{name}.block.{n}", f"{path}.resnets.{n}", shortcut=grows and n == 0)
        if level < top:
            yield _vae_module(f"{name}.downsample.conv", f"{path}.downsamplers.0.conv")
    yield from _vae_ends("encoder")
    yield _vae_module("decoder.conv_in", "decoder.conv_in")
    for level, channels in enumerate(reversed(vae.channels)):
        name, path = f"decoder.up.{top - level}", f"decoder.up_blocks.{level}"
        shrinks = level > 0 and channels != vae.channels[top - level + 1]
        for n in range(vae.resnets + 1):
            yield from _vae_resnet(f"{name}.block.{n}", f"{path}.resnets.{n}", shortcut=shrinks and n == 0)
        if level < top:
            yield _vae_module(f"{name}.upsample.conv", f"{path}.upsamplers.0.conv")
    yield from _vae_ends("decoder")
    if vae.quant_convs:
        yield _vae_module("quant_conv", "quant_conv")
        yield _vae_module("post_quant_conv", "post_quant_conv")


def _vae_ends(half: str) -> Iterator[Module]:
    """Yield the middle and the output modules of the encoder or the decoder."""
    yield from _vae_resnet(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", shortcut=False)
    attention, path = f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0"
    yield _vae_module(f"{attention}.norm", f"{path}.group_norm")
    for name, axis in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        yield _vae_module(f"{attention}.{name}", f"{path}.{axis}", squeeze=True)
    yield from _vae_resnet(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", shortcut=False)
    yield _vae_module(f"{half}.norm_out", f"{half}.conv_norm_out")
    yield _vae_module(f"{half}.conv_out", f"{half}.conv_out")


def _vae_resnet(name: str, path: str, *, shortcut: bool) -> Iterator[Module]:
    for inner in ("norm1", "conv1", "norm2", "conv2"):
        yield _vae_module(f"{name}.{inner}", f"{path}.{inner}")
    if shortcut:
        yield _vae_module(f"{name}.nin_shortcut", f"{path}.conv_shortcut")


def _vae_module(name: str, path: str, *, squeeze: bool = False) -> Module:
    weight = TensorView(f"{VAE_ROOT}{name}.weight", squeeze=squeeze)
    bias = TensorView(f"{VAE_ROOT}{name}.bias")
    return Module(f"vae.{name}", path, "vae", Factoring.NEVER, (("weight", weight), ("bias", bias)))
