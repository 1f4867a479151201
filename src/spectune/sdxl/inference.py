"""Infer the layout of a model from the shapes of its tensors, with sgm or diffusers names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any, Literal, cast

from spectune.errors import InputError
from spectune.files.provenance import LAYOUT_KEY, Provenance
from spectune.files.source import TensorInfo, WeightSource
from spectune.sdxl.layout import (
    HEAD_CHANNELS,
    NORM_GROUPS,
    NOT_SDXL,
    SDXL,
    SDXL_VAE_SCALE,
    SDXL_VAE_SHIFT,
    TE1_ROOT,
    TE2_ROOT,
    TIME_IDS,
    UNET_ROOT,
    VAE_ROOT,
    Layout,
    PartLayouts,
    PartName,
    TextLayout,
    UNetLayout,
    VaeLayout,
    default_heads,
    read_hints,
)

_SGM_VAE = "encoder.down.{}.block.{}.conv1.weight"
_DIFFUSERS_VAE = "encoder.down_blocks.{}.resnets.{}.conv1.weight"


def infer_layout(source: WeightSource) -> Layout:
    """Return the layout of a checkpoint with a UNet and both text encoders.

    Raises:
        InputError: It is not an SDXL, it has no text encoders, or SDXL's 64 channels per attention head do
            not divide its widths and the metadata does not give the number of heads.
    """
    return _with_encoders(infer_parts(source), source.label)


def infer_parts(source: WeightSource) -> PartLayouts:
    """Return the layout of a checkpoint that has at least a UNet; errors as in `infer_layout`."""
    hints = read_hints(source.metadata)
    layout = part_layouts(source.tensors, hints, source.provenance, label=source.label)
    _check_heads(layout, hints, source.label)
    return layout


def layout_of(
    tensors: Mapping[str, TensorInfo],
    hints: Mapping[str, Any] | None = None,
    provenance: Provenance | None = None,
    *,
    label: str = "the checkpoint",
) -> Layout:
    """Return the layout of the tensors of a single file with a UNet and both text encoders.

    If `hints` does not give the heads, they have 64 channels each; a narrower layer has one head.
    """
    return _with_encoders(part_layouts(tensors, hints, provenance, label=label), label)


def part_layouts(
    tensors: Mapping[str, TensorInfo],
    hints: Mapping[str, Any] | None = None,
    provenance: Provenance | None = None,
    *,
    label: str = "the checkpoint",
) -> PartLayouts:
    """Return the layout of the tensors of a single file that has at least a UNet; see `layout_of`."""
    kind = _other_kind(tensors)

    def probe(root: str) -> ShapeProbe:
        return ShapeProbe(tensors, label, root=root, kind=kind)

    def has(root: str) -> bool:
        return any(name.startswith(root) for name in tensors)

    hints, provenance = hints or {}, provenance or Provenance()
    te1, te2 = probe(TE1_ROOT), probe(TE2_ROOT)
    pooled = te2.shape("text_projection", 2)[1] if has(TE2_ROOT) else None  # used as x @ P
    heads = hints.get("te1_heads"), hints.get("te2_heads")
    return PartLayouts(
        unet=_sgm_unet(probe(UNET_ROOT), pooled, hints),
        te1=_text(te1, _TRANSFORMERS, "quick_gelu", heads=heads[0]) if has(TE1_ROOT) else None,
        te2=None if pooled is None else _text(te2, _OPENCLIP, "gelu", heads=heads[1], projection=pooled),
        vae=_sgm_vae(probe(VAE_ROOT), hints, provenance),
    )


def missing_parts(layout: PartLayouts) -> str:
    """Return the parts that a checkpoint lacks, for messages: `text encoders and VAE`; empty for none."""
    lacks = layout.lacks
    titles = {"te1": "text encoder 1", "te2": "text encoder 2", "vae": "VAE"}
    named = [titles[part] for part in lacks if part in titles]
    return " and ".join(["text encoders", *named[2:]] if {"te1", "te2"} <= {*lacks} else named)


def adding_parts(label: str) -> str:
    """Return the hint for a checkpoint without text encoders."""
    command = f"spectune slice {label}:unet BASE:te BASE:vae -o whole.safetensors"
    return f"`{command}` adds the missing parts of BASE, a complete SDXL checkpoint"


def _with_encoders(layout: PartLayouts, label: str) -> Layout:
    if layout.te1 is None or layout.te2 is None:
        raise InputError(
            f"{label} is the UNet of an SDXL, without {missing_parts(layout)}", hint=adding_parts(label)
        )
    return Layout(layout.unet, layout.te1, layout.te2, layout.vae)


def layout_of_modules(
    states: Mapping[PartName, Mapping[str, TensorInfo]], labels: Mapping[PartName, str]
) -> Layout:
    """Return the layout of running modules from the shapes of their state dicts; `vae` may be absent.

    Heads, norm groups and the VAE's factors get SDXL's values: no tensor shows them, and no name depends on
    them.

    Raises:
        InputError: A tensor that every SDXL has is missing. The message contains the label of its part.
    """
    probes = {part: ShapeProbe(state, labels[part]) for part, state in states.items()}
    pooled = probes["te2"].shape("text_projection.weight", 2)[0]
    te2 = ShapeProbe(states["te2"], labels["te2"], root="text_model.")
    if "vae" in probes:
        probes["vae"].shape(_DIFFUSERS_VAE.format(0, 0), 4)
    return Layout(
        unet=_diffusers_unet(probes["unet"], pooled),
        te1=_text(probes["te1"], _TRANSFORMERS, "quick_gelu"),
        te2=_text(te2, _TRANSFORMERS, "gelu", projection=pooled),
        vae=vae_layout(probes["vae"], sgm=False) if "vae" in probes else None,
    )


class ShapeProbe:
    """The shapes of tensors by name; a missing or misshapen tensor raises InputError with the file's label.

    `root` is the prefix of all names in the file. `kind` completes the message "is not an SDXL checkpoint".
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        label: str,
        *,
        root: str = "",
        kind: str = "",
        hint: str = NOT_SDXL,
    ) -> None:
        self.tensors = tensors
        self.label = label
        self.root = root
        self.kind = kind
        self.hint = hint

    def has(self, name: str) -> bool:
        return self.root + name in self.tensors

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """Return the shape of a tensor with this number of axes."""
        info = self.tensors.get(self.root + name)
        if info is None:
            what = f"{self.label} is not an SDXL checkpoint{self.kind}: no {self.root}{name}"
            raise InputError(what, hint=self.hint)
        if len(info.shape) != axes:
            raise self.error(f"{self.root}{name} has shape {info.shape}, expected {axes} axes")
        return info.shape

    def count(self, template: str) -> int:
        """Return the number of existing tensors `template` with 0, 1, 2, ..., up to the first gap."""
        return sum(1 for _ in takewhile(lambda n: self.has(template.format(n)), count()))

    def error(self, what: str) -> InputError:
        return InputError(f"{self.label} does not have SDXL's structure: {what}", hint=self.hint)


@dataclass(frozen=True)
class _UNetNames:
    """The names of the tensors that determine the sizes of a UNet."""

    conv_in: str
    conv_out: str
    embedding: str  # its input is the pooled text conditioning and the time ids
    middle: str  # the transformer of the middle
    conv: str  # the first convolution of a resnet, relative to the resnet


_SGM = _UNetNames(
    "input_blocks.0.0.weight", "out.2.weight", "label_emb.0.0.weight", "middle_block.1", "in_layers.2.weight"
)
_DIFFUSERS = _UNetNames(
    "conv_in.weight",
    "conv_out.weight",
    "add_embedding.linear_1.weight",
    "mid_block.attentions.0",
    "conv1.weight",
)

_Levels = Sequence[Sequence[tuple[str, str]]]  # per level, from full resolution: resnet, transformer


def _sgm_unet(probe: ShapeProbe, pooled: int | None, hints: Mapping[str, Any]) -> UNetLayout:
    """Return the layout of a UNet with sgm names: a block that scales down begins a new level."""
    probe.shape(_SGM.conv_in, 4)
    levels: list[list[tuple[str, str]]] = [[]]
    for n in count(1):
        if probe.has(f"input_blocks.{n}.0.{_SGM.conv}"):
            levels[-1].append((f"input_blocks.{n}.0", f"input_blocks.{n}.1"))
        elif probe.has(f"input_blocks.{n}.0.op.weight"):
            levels.append([])
        else:
            break
    if not all(levels):
        probe.shape(f"input_blocks.1.0.{_SGM.conv}", 4)
        raise probe.error("a level of input_blocks has no resnet")
    return _unet(probe, _SGM, levels, pooled, hints)


def _diffusers_unet(probe: ShapeProbe, pooled: int) -> UNetLayout:
    probe.shape(f"down_blocks.0.resnets.0.{_DIFFUSERS.conv}", 4)
    levels = [
        [
            (f"down_blocks.{level}.resnets.{n}", f"down_blocks.{level}.attentions.{n}")
            for n in range(probe.count(f"down_blocks.{level}.resnets.{{}}.{_DIFFUSERS.conv}"))
        ]
        for level in range(probe.count(f"down_blocks.{{}}.resnets.0.{_DIFFUSERS.conv}"))
    ]
    return _unet(probe, _DIFFUSERS, levels, pooled, {})


def _unet(
    probe: ShapeProbe, names: _UNetNames, levels: _Levels, pooled: int | None, hints: Mapping[str, Any]
) -> UNetLayout:
    resnets = [len(level) for level in levels]
    if len(set(resnets)) > 1:
        raise probe.error(f"its levels have {resnets} resnets, expected the same number")
    channels = tuple(probe.shape(f"{level[0][0]}.{names.conv}", 4)[0] for level in levels)
    embed_in = probe.shape(names.embedding, 2)[1]
    if pooled is None:  # a UNet alone: no shape separates the two inputs, and no layer depends on them
        pooled = embed_in - TIME_IDS * min(SDXL.unet.time_id_channels, (embed_in - 1) // TIME_IDS)
    if embed_in <= pooled or (embed_in - pooled) % TIME_IDS:
        raise probe.error(f"{names.embedding} has {embed_in} inputs, expected {pooled} + {TIME_IDS} x n")
    heads = cast(list[int], hints.get("unet_heads", [default_heads(n) for n in channels]))
    if len(heads) != len(channels):
        raise InputError(
            f"metadata {LAYOUT_KEY} of {probe.label}: unet_heads {heads}, expected {len(channels)} numbers"
        )
    return UNetLayout(
        channels=channels,
        depths=tuple(_depth(probe, n, [block for _, block in level]) for n, level in enumerate(levels)),
        mid_depth=probe.count(f"{names.middle}.transformer_blocks.{{}}.norm1.weight"),
        resnets=resnets[0],
        in_channels=probe.shape(names.conv_in, 4)[1],
        out_channels=probe.shape(names.conv_out, 4)[0],
        context=probe.shape(f"{names.middle}.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        heads=tuple(heads),
        time_id_channels=(embed_in - pooled) // TIME_IDS,
        pooled=pooled,
        norm_groups=hints.get("unet_norm_groups", NORM_GROUPS),
    )


def _depth(probe: ShapeProbe, level: int, transformers: Sequence[str]) -> int:
    depths = {probe.count(f"{name}.transformer_blocks.{{}}.norm1.weight") for name in transformers}
    if len(depths) > 1:
        raise probe.error(f"transformers on level {level} have different depths: {sorted(depths)}")
    return depths.pop()


@dataclass(frozen=True)
class _TextNames:
    """The names of the tensors that determine the sizes of a text encoder."""

    token: str
    position: str
    mlp: str


_OPENCLIP = _TextNames(
    "token_embedding.weight", "positional_embedding", "transformer.resblocks.{}.mlp.c_fc.weight"
)
_TRANSFORMERS = _TextNames(
    "embeddings.token_embedding.weight",
    "embeddings.position_embedding.weight",
    "encoder.layers.{}.mlp.fc1.weight",
)


def _text(
    probe: ShapeProbe,
    names: _TextNames,
    activation: Literal["quick_gelu", "gelu"],
    *,
    heads: int | None = None,
    projection: int | None = None,
) -> TextLayout:
    vocab, width = probe.shape(names.token, 2)
    return TextLayout(
        width=width,
        layers=probe.count(names.mlp),
        heads=default_heads(width) if heads is None else heads,
        mlp=probe.shape(names.mlp.format(0), 2)[0],
        vocab=vocab,
        context=probe.shape(names.position, 2)[0],
        projection=projection,
        activation=activation,
    )


def _sgm_vae(probe: ShapeProbe, hints: Mapping[str, Any], provenance: Provenance) -> VaeLayout | None:
    if not probe.has("decoder.conv_in.weight"):
        return None
    return vae_layout(
        probe,
        sgm=True,
        norm_groups=hints.get("vae_norm_groups", NORM_GROUPS),
        scale=SDXL_VAE_SCALE if provenance.vae_scale is None else provenance.vae_scale,
        shift=SDXL_VAE_SHIFT if provenance.vae_shift is None else provenance.vae_shift,
    )


def vae_layout(
    probe: ShapeProbe,
    *,
    sgm: bool,
    norm_groups: int = NORM_GROUPS,
    scale: float = SDXL_VAE_SCALE,
    shift: float = SDXL_VAE_SHIFT,
) -> VaeLayout:
    """Return the layout of a VAE with sgm or diffusers names; shapes do not determine the last arguments."""
    conv = _SGM_VAE if sgm else _DIFFUSERS_VAE
    levels = probe.count(conv.format("{}", 0))
    return VaeLayout(
        channels=tuple(probe.shape(conv.format(level, 0), 4)[0] for level in range(levels)),
        resnets=probe.count(conv.format(0, "{}")),
        latent_channels=probe.shape("decoder.conv_in.weight", 4)[1],
        norm_groups=norm_groups,
        scale=scale,
        shift=shift,
        quant_convs=probe.has("post_quant_conv.weight"),
    )


def _check_heads(layout: PartLayouts, hints: Mapping[str, Any], label: str) -> None:
    """Raise InputError for a width that the number of heads does not divide."""
    unet = layout.unet
    encoders = (("te1_heads", layout.te1), ("te2_heads", layout.te2))
    checked = [
        *(("unet_heads", *level) for level in zip(unet.channels, unet.heads, unet.depths, strict=True)),
        *((key, text.width, text.heads, text.layers) for key, text in encoders if text is not None),
    ]
    for key, width, heads, depth in checked:
        if depth and width % (heads if key in hints else HEAD_CHANNELS):
            parts = f"{heads} heads" if key in hints else f"heads of {HEAD_CHANNELS} channels"
            raise InputError(
                f"{label}: a width of {width} cannot be divided into {parts}",
                hint=f"set {key} in the metadata {LAYOUT_KEY}",
            )


def _other_kind(tensors: Mapping[str, TensorInfo]) -> str:
    """Guess the kind of a file that is not SDXL, for the message; empty if unknown."""
    signs = {
        "lora_": " but an adapter",
        "cond_stage_model.": " but an SD 1 or 2 checkpoint",
        "conditioner.embedders.0.model.": " but an SDXL refiner",
        "double_blocks.": " but a Flux model",
        "model.diffusion_model.double_blocks.": " but a Flux model",
        "model.diffusion_model.joint_blocks.": " but an SD 3 model",
        "down_blocks.": " but a UNet with diffusers names",
        "text_model.": " but a text encoder",
    }
    signed = [name for name in tensors if name.startswith(tuple(signs))]
    kinds = (kind for sign, kind in signs.items() if any(name.startswith(sign) for name in signed))
    return next(kinds, "") if tensors else " (it has no tensors)"
