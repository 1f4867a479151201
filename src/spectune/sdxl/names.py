"""The spellings of SDXL's parts: single file (sgm) <-> running module (diffusers, transformers) <-> kohya.

One table per part, generated from the layout; every other spelling is looked up in it, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from spectune.errors import InputError, some_of
from spectune.files.source import WeightSource
from spectune.sdxl.layout import (
    TE1_ROOT,
    TE1_SHORT_ROOT,
    TE2_ROOT,
    UNET_ROOT,
    VAE_ROOT,
    Layout,
    TextLayout,
    UNetLayout,
    VaeLayout,
    require,
    te1_root,
)

LOGIT_SCALE = 4.605170185988092  # ln 100, where CLIP's temperature is clipped; SDXL never uses it

ModuleName = Literal["unet", "te1", "te2", "vae"]


class Part(StrEnum):
    """The parts whose layers can be factored."""

    UNET = "unet"
    TE1 = "te1"
    TE2 = "te2"


class Duty(StrEnum):
    """Whether a module is factored."""

    DEFAULT = "default"  # among the modules that LyCORIS preset=full trains
    EXTRA = "extra"  # on request
    WHOLE = "whole"  # never


@dataclass(frozen=True)
class TensorView:
    """A parameter of a running module, as a view of a tensor in the single file."""

    tensor: str
    rows: tuple[int, int] | None = None  # a block of rows of a fused tensor
    transpose: bool = False
    squeeze: bool = False  # a 1x1 convolution in the file, a matrix in the module

    def read(self, tensor: Tensor) -> Tensor:
        """The module's parameter out of the file's tensor; a view of it."""
        if self.rows is not None:
            tensor = tensor[self.rows[0] : self.rows[1]]
        if self.transpose:
            tensor = tensor.T
        # a few programs write the autoencoder's attention as matrices already
        return tensor.flatten(1) if self.squeeze and tensor.ndim > 1 else tensor

    def load(self, source: WeightSource) -> Tensor:
        return self.read(source.load(self.tensor))

    def written(self, parameter: Tensor) -> Tensor:
        """The inverse of read: the file's tensor, or its block of rows."""
        if self.squeeze and parameter.ndim == 2:
            parameter = parameter[:, :, None, None]
        return parameter.T if self.transpose else parameter


@dataclass(frozen=True)
class Module:
    """One module with parameters: its canonical name, its path in the running model, its tensors."""

    layer: str  # "unet.input_blocks.4.1.proj_in"
    path: str  # "down_blocks.1.attentions.0.proj_in"
    block: str  # "down.1"
    duty: Duty
    parameters: tuple[tuple[str, TensorView], ...]  # ("weight", view), ("bias", view)

    @property
    def weight(self) -> TensorView:
        return self.parameters[0][1]

    @property
    def default(self) -> bool:
        """Among the modules that LyCORIS preset=full trains."""
        return self.duty is Duty.DEFAULT

    @property
    def factorable(self) -> bool:
        return self.duty in (Duty.DEFAULT, Duty.EXTRA)


def kohya_stem(layer_name: str) -> str:
    """The key stem of a layer in adapter files: `lora_unet_input_blocks_4_1_proj_in`."""
    return "lora_" + layer_name.replace(".", "_")


def split_adapter_key(key: str) -> tuple[str, str]:
    """Stem and suffix of a kohya key: `lora_te1_..._fc1`, `lora_down.weight`."""
    stem, _, suffix = key.partition(".")
    return stem, suffix


def is_peft_key(key: str) -> bool:
    """Whether a key of an adapter is in the spelling of PEFT or diffusers."""
    return any(sign in key for sign in (".lora_A.", ".lora_B.", ".lora.down.", ".lora.up."))


def diffusers_module(layer_name: str, unet: UNetLayout) -> str:
    """The path of a layer in a diffusers pipeline: `unet.down_blocks.1.attentions.0.proj_in`.

    Text encoders are spelled with `text_model.`, as in files; module_path gives the path in memory.
    """
    part, _, rest = layer_name.partition(".")
    if part == "unet":
        return f"unet.{_unet_paths(unet)[layer_name]}"
    return f"{ {'te1': 'text_encoder', 'te2': 'text_encoder_2'}[part] }.{rest}"


def module_path(layer_name: str, unet: UNetLayout) -> tuple[Part, str]:
    """The part of a layer, and its path inside that part's running module."""
    part, _, rest = layer_name.partition(".")
    if part == "unet":
        return Part.UNET, _unet_paths(unet)[layer_name]
    # transformers 5 drops the prefix of CLIPTextModel in memory, not that of CLIPTextModelWithProjection
    return Part(part), rest.removeprefix("text_model.") if part == "te1" else rest


@cache
def _unet_paths(unet: UNetLayout) -> Mapping[str, str]:
    return MappingProxyType({module.layer: module.path for module in unet_modules(unet)})


def modules_of(layout: Layout, part: ModuleName, *, te1: str = TE1_ROOT) -> tuple[Module, ...]:
    """The table of one part; `te1` is what the first encoder's tensors begin with."""
    match part:
        case "unet":
            return unet_modules(layout.unet)
        case "te1":
            return te1_modules(layout.te1, te1)
        case "te2":
            return te2_modules(layout.te2)
        case "vae":
            return () if layout.vae is None else vae_modules(layout.vae)


def module_tensors(layout: Layout, part: ModuleName, source: WeightSource) -> Mapping[str, TensorView]:
    """The state dict of the running module of `part`, as views of the tensors of a single file.

    Raises InputError when tensors are missing, or when the file has some that the module has not.
    """
    views = _views(modules_of(layout, part, te1=te1_root(source.tensors)))
    if not views:
        raise InputError(f"{source.label} has no {part}")
    needed = {view.tensor for view in views.values()}
    require(source.tensors, sorted(needed), source.label)
    roots = _roots(part)
    spare = [name for name in source.tensors if name.startswith(roots) and name not in needed | _UNUSED]
    if spare:
        raise InputError(
            f"{len(spare)} tensors of {source.label} have no place in the {part}: {some_of(spare)}",
            hint="the model has parts that SDXL does not have, and would run without them",
        )
    return views


def single_file_tensors(
    layout: Layout,
    unet_state: Mapping[str, Tensor],
    te1_state: Mapping[str, Tensor],
    te2_state: Mapping[str, Tensor],
    vae_state: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """The inverse of module_tensors: the tensors of a single file from the state dicts of the modules.

    Fuses q, k, v of the second encoder and adds `position_ids` and `logit_scale`, which no module holds.
    """
    # with or without `text_model.`, as different versions of transformers spell it
    te1_state = {key.removeprefix("text_model."): tensor for key, tensor in te1_state.items()}
    states = {"unet": unet_state, "te1": te1_state, "te2": te2_state, "vae": vae_state or {}}
    tensors: dict[str, Tensor] = {}
    for part in ("unet", "te1", "te2", "vae"):
        tensors |= _inverted(part, _views(modules_of(layout, part)), states[part])
    tensors[f"{TE1_ROOT}embeddings.position_ids"] = torch.arange(layout.te1.context)[None]
    tensors[f"{TE2_ROOT}logit_scale"] = torch.full_like(tensors[f"{TE2_ROOT}ln_final.weight"][0], LOGIT_SCALE)
    return dict(sorted(tensors.items()))


def _views(modules: tuple[Module, ...]) -> dict[str, TensorView]:
    return {f"{module.path}.{name}": view for module in modules for name, view in module.parameters}


def _roots(part: ModuleName) -> tuple[str, ...]:
    roots: Mapping[ModuleName, tuple[str, ...]] = {
        "unet": (UNET_ROOT,),
        "te1": (TE1_ROOT, TE1_SHORT_ROOT),
        "te2": (TE2_ROOT,),
        "vae": (f"{VAE_ROOT}encoder.", f"{VAE_ROOT}decoder."),
    }
    return roots[part]


_UNUSED = frozenset(
    {
        f"{TE1_ROOT}embeddings.position_ids",
        f"{TE1_SHORT_ROOT}embeddings.position_ids",
        f"{TE2_ROOT}logit_scale",
        # the whole CLIP was saved, of which SDXL takes the first encoder's hidden states only
        f"{TE1_SHORT_ROOT}logit_scale",
        f"{TE1_SHORT_ROOT}text_projection.weight",
    }
)


def _inverted(
    part: ModuleName, views: Mapping[str, TensorView], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    assert views.keys() == state.keys() - {"embeddings.position_ids"}, (
        f"{part}: {some_of(sorted(views.keys() ^ state.keys()))}"
    )
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for key, view in views.items():
        start = 0 if view.rows is None else view.rows[0]
        pieces.setdefault(view.tensor, []).append((start, view.written(state[key])))
    return {
        tensor: _joined([piece for _, piece in sorted(found, key=_start)]) for tensor, found in pieces.items()
    }


def _start(piece: tuple[int, Tensor]) -> int:
    return piece[0]


def _joined(blocks: list[Tensor]) -> Tensor:
    return blocks[0].contiguous() if len(blocks) == 1 else torch.cat(blocks)


def unet_modules(unet: UNetLayout) -> tuple[Module, ...]:
    """The UNet: sgm numbers its blocks through, diffusers counts levels and the modules in them."""
    return tuple(_unet_modules(unet))


def _unet_modules(unet: UNetLayout) -> Iterator[Module]:
    levels, per_level = len(unet.channels), unet.resnets + 1
    yield _unet_module("time_embed.0", "time_embedding.linear_1", "embed", duty=Duty.EXTRA)
    yield _unet_module("time_embed.2", "time_embedding.linear_2", "embed", duty=Duty.EXTRA)
    yield _unet_module("label_emb.0.0", "add_embedding.linear_1", "embed", duty=Duty.EXTRA)
    yield _unet_module("label_emb.0.2", "add_embedding.linear_2", "embed", duty=Duty.EXTRA)
    yield _unet_module("input_blocks.0.0", "conv_in", "embed", duty=Duty.EXTRA)
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
    yield _unet_module("out.0", "conv_norm_out", "embed", duty=Duty.WHOLE)
    yield _unet_module("out.2", "conv_out", "embed", duty=Duty.EXTRA)


def _unet_module(name: str, path: str, block: str, *, duty: Duty = Duty.DEFAULT, bias: bool = True) -> Module:
    parameters = ("weight", "bias") if bias else ("weight",)
    views = tuple((parameter, TensorView(f"{UNET_ROOT}{name}.{parameter}")) for parameter in parameters)
    return Module(f"unet.{name}", path, block, duty, views)


def _resnet(name: str, path: str, block: str, *, shortcut: bool) -> Iterator[Module]:
    yield _unet_module(f"{name}.in_layers.0", f"{path}.norm1", block, duty=Duty.WHOLE)
    yield _unet_module(f"{name}.in_layers.2", f"{path}.conv1", block)
    yield _unet_module(f"{name}.emb_layers.1", f"{path}.time_emb_proj", block)
    yield _unet_module(f"{name}.out_layers.0", f"{path}.norm2", block, duty=Duty.WHOLE)
    yield _unet_module(f"{name}.out_layers.3", f"{path}.conv2", block)
    if shortcut:
        yield _unet_module(f"{name}.skip_connection", f"{path}.conv_shortcut", block)


def _transformer(name: str, path: str, block: str, depth: int) -> Iterator[Module]:
    """`depth` transformer blocks with their projections; nothing at depth 0. Both spellings agree inside."""
    if not depth:
        return
    yield _unet_module(f"{name}.norm", f"{path}.norm", block, duty=Duty.WHOLE)
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
            yield _unet_module(f"{inner}.{norm}", f"{inner_path}.{norm}", block, duty=Duty.WHOLE)
    yield _unet_module(f"{name}.proj_out", f"{path}.proj_out", block)


def te1_modules(text: TextLayout, root: str = TE1_ROOT) -> tuple[Module, ...]:
    """The first encoder; the running module has the file's names without `text_model.`."""
    return tuple(_te1_modules(text, root))


def _te1_modules(text: TextLayout, root: str) -> Iterator[Module]:
    def module(path: str, block: str, duty: Duty, parameters: tuple[str, ...] = ("weight", "bias")) -> Module:
        views = tuple((parameter, TensorView(f"{root}{path}.{parameter}")) for parameter in parameters)
        return Module(f"te1.text_model.{path}", path, block, duty, views)

    yield module("embeddings.token_embedding", "te1.embed", Duty.WHOLE, ("weight",))
    yield module("embeddings.position_embedding", "te1.embed", Duty.WHOLE, ("weight",))
    for n in range(text.layers):
        for linear in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
            yield module(f"encoder.layers.{n}.{linear}", f"te1.{n}", Duty.DEFAULT)
        for linear in ("mlp.fc1", "mlp.fc2"):
            yield module(f"encoder.layers.{n}.{linear}", f"te1.{n}", Duty.DEFAULT)
        for norm in ("layer_norm1", "layer_norm2"):
            yield module(f"encoder.layers.{n}.{norm}", f"te1.{n}", Duty.WHOLE)
    yield module("final_layer_norm", "te1.embed", Duty.WHOLE)


def te2_modules(text: TextLayout) -> tuple[Module, ...]:
    """The second encoder: OpenCLIP in the file, with q, k, v in one tensor; transformers in memory."""
    return tuple(_te2_modules(text))


def _te2_modules(text: TextLayout) -> Iterator[Module]:
    def module(path: str, block: str, duty: Duty, **views: TensorView) -> Module:
        return Module(f"te2.{path}", path, block, duty, tuple(views.items()))

    def plain(path: str, name: str, block: str, duty: Duty) -> Module:
        weight, bias = TensorView(f"{TE2_ROOT}{name}.weight"), TensorView(f"{TE2_ROOT}{name}.bias")
        return module(path, block, duty, weight=weight, bias=bias)

    token = TensorView(f"{TE2_ROOT}token_embedding.weight")
    position = TensorView(f"{TE2_ROOT}positional_embedding")
    projection = TensorView(f"{TE2_ROOT}text_projection", transpose=True)
    yield module("text_model.embeddings.token_embedding", "te2.embed", Duty.WHOLE, weight=token)
    yield module("text_model.embeddings.position_embedding", "te2.embed", Duty.WHOLE, weight=position)
    for n in range(text.layers):
        path, name, block = f"text_model.encoder.layers.{n}", f"transformer.resblocks.{n}", f"te2.{n}"
        for index, axis in enumerate("qkv"):
            rows = (index * text.width, (index + 1) * text.width)
            weight = TensorView(f"{TE2_ROOT}{name}.attn.in_proj_weight", rows=rows)
            bias = TensorView(f"{TE2_ROOT}{name}.attn.in_proj_bias", rows=rows)
            yield module(f"{path}.self_attn.{axis}_proj", block, Duty.DEFAULT, weight=weight, bias=bias)
        yield plain(f"{path}.self_attn.out_proj", f"{name}.attn.out_proj", block, Duty.DEFAULT)
        yield plain(f"{path}.mlp.fc1", f"{name}.mlp.c_fc", block, Duty.DEFAULT)
        yield plain(f"{path}.mlp.fc2", f"{name}.mlp.c_proj", block, Duty.DEFAULT)
        yield plain(f"{path}.layer_norm1", f"{name}.ln_1", block, Duty.WHOLE)
        yield plain(f"{path}.layer_norm2", f"{name}.ln_2", block, Duty.WHOLE)
    yield plain("text_model.final_layer_norm", "ln_final", "te2.embed", Duty.WHOLE)
    yield module("text_projection", "te2.embed", Duty.WHOLE, weight=projection)


def vae_modules(vae: VaeLayout) -> tuple[Module, ...]:
    """The autoencoder; the file counts the decoder's levels from the top, diffusers from the deepest."""
    return tuple(_vae_modules(vae))


def _vae_modules(vae: VaeLayout) -> Iterator[Module]:
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
    yield _vae_module("quant_conv", "quant_conv")
    yield _vae_module("post_quant_conv", "post_quant_conv")


def _vae_ends(half: str) -> Iterator[Module]:
    """The middle and the output of the encoder or the decoder."""
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
    return Module(f"vae.{name}", path, "vae", Duty.WHOLE, (("weight", weight), ("bias", bias)))


def state_views(layout: Layout, part: ModuleName, *, te1: str = TE1_ROOT) -> Mapping[str, TensorView]:
    """The state dict of a part as views of single-file tensors, whatever a file holds; empty for no VAE."""
    return _views(modules_of(layout, part, te1=te1))
