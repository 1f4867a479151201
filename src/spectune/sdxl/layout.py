"""The sizes of an SDXL checkpoint: inferred from its tensors, the rest from its metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any, Literal, cast

from spectune.errors import InputError, did_you_mean, some_of
from spectune.files.provenance import LAYOUT_KEY, Provenance
from spectune.files.source import TensorInfo, WeightSource

UNET_ROOT = "model.diffusion_model."
TE1_ROOT = "conditioner.embedders.0.transformer.text_model."
TE1_SHORT_ROOT = "conditioner.embedders.0.transformer."  # as transformers 5 spells it when it saves
TE2_ROOT = "conditioner.embedders.1.model."
VAE_ROOT = "first_stage_model."
PART_ROOTS: Mapping[str, str] = {"unet": UNET_ROOT, "te1": TE1_SHORT_ROOT, "te2": TE2_ROOT, "vae": VAE_ROOT}
PARTS = tuple(PART_ROOTS)

HEAD_CHANNELS = 64
NORM_GROUPS = 32
TIME_IDS = 6  # original height and width, crop top and left, target height and width
SDXL_VAE_SCALE = 0.13025
SDXL_VAE_SHIFT = 0.0

HINTS = ("unet_heads", "te1_heads", "te2_heads", "unet_norm_groups", "vae_norm_groups")
NOT_SDXL = "spectune reads SDXL checkpoints in their single-file (sgm) spelling"


@dataclass(frozen=True)
class UNetLayout:
    """The UNet; tuples have one entry per level, from full resolution downwards."""

    channels: tuple[int, ...]  # SDXL: 320, 640, 1280
    depths: tuple[int, ...]  # transformer blocks after each resnet, 0 for none; SDXL: 0, 2, 10
    mid_depth: int
    resnets: int  # per level on the way down, one more on the way up
    in_channels: int
    out_channels: int
    context: int  # width of the text conditioning
    heads: tuple[int, ...]
    time_id_channels: int  # sinusoids per time id
    pooled: int  # width of the pooled text conditioning
    norm_groups: int


@dataclass(frozen=True)
class TextLayout:
    """A CLIP text encoder."""

    width: int
    layers: int
    heads: int
    mlp: int
    vocab: int
    context: int  # tokens
    projection: int | None  # width of the pooled output, None without a projection
    activation: Literal["quick_gelu", "gelu"]


@dataclass(frozen=True)
class VaeLayout:
    """The autoencoder: latents = (z - shift) * scale."""

    channels: tuple[int, ...]  # per level, from full resolution downwards
    resnets: int  # per level of the encoder, one more in the decoder
    latent_channels: int
    norm_groups: int
    scale: float
    shift: float


@dataclass(frozen=True)
class Layout:
    unet: UNetLayout
    te1: TextLayout
    te2: TextLayout
    vae: VaeLayout | None


# The original, which names the layers of adapters where no model is at hand.
SDXL = Layout(
    unet=UNetLayout(
        channels=(320, 640, 1280),
        depths=(0, 2, 10),
        mid_depth=10,
        resnets=2,
        in_channels=4,
        out_channels=4,
        context=2048,
        heads=(5, 10, 20),
        time_id_channels=256,
        pooled=1280,
        norm_groups=NORM_GROUPS,
    ),
    te1=TextLayout(
        width=768, layers=12, heads=12, mlp=3072, vocab=49408, context=77, projection=None,
        activation="quick_gelu",
    ),
    te2=TextLayout(
        width=1280, layers=32, heads=20, mlp=5120, vocab=49408, context=77, projection=1280,
        activation="gelu",
    ),
    vae=VaeLayout(
        channels=(128, 256, 512, 512), resnets=2, latent_channels=4, norm_groups=NORM_GROUPS,
        scale=SDXL_VAE_SCALE, shift=SDXL_VAE_SHIFT,
    ),
)  # fmt: skip


def infer_layout(source: WeightSource) -> Layout:
    """The layout of a checkpoint.

    Raises InputError if it is no SDXL, or if its attention heads can neither be told from its metadata nor
    follow SDXL's 64 channels per head.
    """
    hints = read_hints(source.metadata)
    layout = layout_of(source.tensors, hints, source.provenance, label=source.label)
    _check_heads(layout, hints, source.label)
    return layout


def layout_of(
    tensors: Mapping[str, TensorInfo],
    hints: Mapping[str, Any] | None = None,
    provenance: Provenance | None = None,
    *,
    label: str = "the checkpoint",
) -> Layout:
    """The layout of named shapes; numbers of heads that no hint gives are 64 channels each, at least one."""
    probe = _Probe(tensors, hints or {}, label)
    te2 = _te2(probe)
    return Layout(
        unet=_unet(probe, te2), te1=_te1(probe), te2=te2, vae=_vae(probe, provenance or Provenance())
    )


def hints_metadata(layout: Layout) -> dict[str, str]:
    """The metadata entry from which infer_layout reads what tensors cannot tell."""
    hints: dict[str, Any] = {
        "unet_heads": list(layout.unet.heads),
        "te1_heads": layout.te1.heads,
        "te2_heads": layout.te2.heads,
        "unet_norm_groups": layout.unet.norm_groups,
    }
    if layout.vae is not None:
        hints["vae_norm_groups"] = layout.vae.norm_groups
    return {LAYOUT_KEY: json.dumps(hints)}


def read_hints(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The entries of `spectune.layout`; raises InputError for one that is not known or not a number."""
    text = metadata.get(LAYOUT_KEY, "{}")
    try:
        hints = json.loads(text)
    except ValueError:
        hints = None
    if not isinstance(hints, dict):
        raise InputError(f"metadata {LAYOUT_KEY} is not a JSON object: {text[:80]}")
    for key, value in cast(dict[str, Any], hints).items():
        if key not in HINTS:
            raise InputError(f"metadata {LAYOUT_KEY} has an unknown key `{key}`{did_you_mean(key, HINTS)}")
        per_level = key == "unet_heads"
        numbers = cast(list[Any], value) if isinstance(value, list) else [value]
        if isinstance(value, list) != per_level or not all(type(n) is int and n > 0 for n in numbers):
            expected = "a list of positive whole numbers" if per_level else "a positive whole number"
            raise InputError(f"metadata {LAYOUT_KEY}: {key} is {value!r}: expected {expected}")
    return cast(dict[str, Any], hints)


class _Probe:
    """Asks for tensors by full name; a tensor that must be there and is not makes the file no SDXL."""

    def __init__(self, tensors: Mapping[str, TensorInfo], hints: Mapping[str, Any], label: str) -> None:
        self.tensors = tensors
        self.hints = hints
        self.label = label

    def has(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            kind = _kind(self.tensors)
            raise InputError(f"{self.label} is not an SDXL checkpoint{kind}: no {name}", hint=NOT_SDXL)
        return self.tensors[name].shape

    def run(self, name: Callable[[int], str]) -> int:
        """How many of name(0), name(1), ... there are without a gap."""
        return sum(1 for _ in takewhile(lambda n: self.has(name(n)), count()))

    def wrong(self, what: str) -> InputError:
        return InputError(f"{self.label} is not laid out like SDXL: {what}", hint=NOT_SDXL)


def _unet(probe: _Probe, te2: TextLayout) -> UNetLayout:
    first, out = probe.shape(f"{UNET_ROOT}input_blocks.0.0.weight"), probe.shape(f"{UNET_ROOT}out.2.weight")
    levels = _levels(probe)
    resnets = len(levels[0])
    if any(len(level) != resnets for level in levels):
        counts = [len(level) for level in levels]
        raise probe.wrong(f"its levels have {counts} resnets, expected the same number")
    channels = tuple(probe.shape(f"{level[0]}.0.in_layers.2.weight")[0] for level in levels)
    depths = tuple(_depth(probe, level) for level in levels)
    mid = f"{UNET_ROOT}middle_block.1"
    mid_depth = probe.run(lambda n: f"{mid}.transformer_blocks.{n}.norm1.weight")
    embed_in = probe.shape(f"{UNET_ROOT}label_emb.0.0.weight")[1]
    pooled = te2.projection or 0
    if embed_in <= pooled or (embed_in - pooled) % TIME_IDS:
        raise probe.wrong(f"label_emb takes {embed_in} channels, expected {pooled} + {TIME_IDS} x n")
    heads = cast(list[int], probe.hints.get("unet_heads", [_default_heads(n) for n in channels]))
    if len(heads) != len(channels):
        raise InputError(
            f"metadata {LAYOUT_KEY} of {probe.label}: unet_heads {heads}, expected {len(channels)} numbers"
        )
    return UNetLayout(
        channels=channels,
        depths=depths,
        mid_depth=mid_depth,
        resnets=resnets,
        in_channels=first[1],
        out_channels=out[0],
        context=probe.shape(f"{mid}.transformer_blocks.0.attn2.to_k.weight")[1],
        heads=tuple(heads),
        time_id_channels=(embed_in - pooled) // TIME_IDS,
        pooled=pooled,
        norm_groups=probe.hints.get("unet_norm_groups", NORM_GROUPS),
    )


def _levels(probe: _Probe) -> list[list[str]]:
    """Input blocks that hold a resnet, cut into levels by the blocks that scale down."""
    levels: list[list[str]] = [[]]
    for n in count(1):
        block = f"{UNET_ROOT}input_blocks.{n}"
        if probe.has(f"{block}.0.in_layers.2.weight"):
            levels[-1].append(block)
        elif probe.has(f"{block}.0.op.weight"):
            levels.append([])
        else:
            break
    if not all(levels):
        probe.shape(f"{UNET_ROOT}input_blocks.1.0.in_layers.2.weight")
        raise probe.wrong("a level of its input_blocks has no resnet")
    return levels


def _depth(probe: _Probe, level: list[str]) -> int:
    depths = {probe.run(lambda n, at=block: f"{at}.1.transformer_blocks.{n}.norm1.weight") for block in level}
    if len(depths) > 1:
        raise probe.wrong(f"transformers of different depth on the level of {level[0]}: {sorted(depths)}")
    return depths.pop()


def te1_root(tensors: Mapping[str, Any]) -> str:
    """What the first encoder's tensors begin with, in this file."""
    short = f"{TE1_SHORT_ROOT}embeddings.token_embedding.weight" in tensors
    return TE1_SHORT_ROOT if short else TE1_ROOT


def _te1(probe: _Probe) -> TextLayout:
    root = te1_root(probe.tensors)
    vocab, width = probe.shape(f"{root}embeddings.token_embedding.weight")
    return TextLayout(
        width=width,
        layers=probe.run(lambda n: f"{root}encoder.layers.{n}.mlp.fc1.weight"),
        heads=probe.hints.get("te1_heads", _default_heads(width)),
        mlp=probe.shape(f"{root}encoder.layers.0.mlp.fc1.weight")[0],
        vocab=vocab,
        context=probe.shape(f"{root}embeddings.position_embedding.weight")[0],
        projection=None,
        activation="quick_gelu",
    )


def _te2(probe: _Probe) -> TextLayout:
    vocab, width = probe.shape(f"{TE2_ROOT}token_embedding.weight")
    blocks = f"{TE2_ROOT}transformer.resblocks"
    return TextLayout(
        width=width,
        layers=probe.run(lambda n: f"{blocks}.{n}.mlp.c_fc.weight"),
        heads=probe.hints.get("te2_heads", _default_heads(width)),
        mlp=probe.shape(f"{blocks}.0.mlp.c_fc.weight")[0],
        vocab=vocab,
        context=probe.shape(f"{TE2_ROOT}positional_embedding")[0],
        projection=probe.shape(f"{TE2_ROOT}text_projection")[1],  # used as x @ P
        activation="gelu",
    )


def _vae(probe: _Probe, provenance: Provenance) -> VaeLayout | None:
    if not probe.has(f"{VAE_ROOT}decoder.conv_in.weight"):
        return None
    down = f"{VAE_ROOT}encoder.down"
    levels = probe.run(lambda n: f"{down}.{n}.block.0.conv1.weight")
    scale, shift = provenance.vae_scale, provenance.vae_shift
    return VaeLayout(
        channels=tuple(probe.shape(f"{down}.{n}.block.0.conv1.weight")[0] for n in range(levels)),
        resnets=probe.run(lambda n: f"{down}.0.block.{n}.conv1.weight"),
        latent_channels=probe.shape(f"{VAE_ROOT}post_quant_conv.weight")[0],
        norm_groups=probe.hints.get("vae_norm_groups", NORM_GROUPS),
        scale=SDXL_VAE_SCALE if scale is None else scale,
        shift=SDXL_VAE_SHIFT if shift is None else shift,
    )


def _default_heads(width: int) -> int:
    return max(width // HEAD_CHANNELS, 1)


def _check_heads(layout: Layout, hints: Mapping[str, Any], label: str) -> None:
    widths = {
        "unet_heads": layout.unet.channels,
        "te1_heads": (layout.te1.width,),
        "te2_heads": (layout.te2.width,),
    }
    heads = {
        "unet_heads": layout.unet.heads,
        "te1_heads": (layout.te1.heads,),
        "te2_heads": (layout.te2.heads,),
    }
    used = {key: [True] * len(value) for key, value in heads.items()}
    used["unet_heads"] = [depth > 0 for depth in layout.unet.depths]
    for key in heads:
        for width, number, needed in zip(widths[key], heads[key], used[key], strict=True):
            if needed and width % (number if key in hints else HEAD_CHANNELS):
                raise InputError(
                    f"{label}: a width of {width} does not divide into "
                    + (f"{number} heads" if key in hints else f"heads of {HEAD_CHANNELS} channels"),
                    hint=f"metadata {LAYOUT_KEY} must give {key}",
                )


def _kind(tensors: Mapping[str, TensorInfo]) -> str:
    """A guess at what else the file is, for the message."""
    signs = {
        "lora_": " but an adapter",
        "cond_stage_model.": " but an SD 1 or 2 checkpoint",
        "conditioner.embedders.0.model.": " but an SDXL refiner",
        "double_blocks.": " but a Flux model",
        "model.diffusion_model.double_blocks.": " but a Flux model",
        "model.diffusion_model.joint_blocks.": " but an SD 3 model",
        "down_blocks.": " but a UNet in diffusers spelling",
        "text_model.": " but a text encoder",
    }
    found = (kind for sign, kind in signs.items() if any(name.startswith(sign) for name in tensors))
    return next(found, "") if tensors else " (it has no tensors)"


def require(tensors: Mapping[str, TensorInfo], names: list[str], label: str) -> None:
    """Raise InputError unless all `names` are there."""
    missing = [name for name in names if name not in tensors]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(names)} tensors are missing in {label}: {some_of(missing)}",
            hint=NOT_SDXL,
        )


def part_of(tensor: str) -> str:
    """The part of a checkpoint that a tensor belongs to: unet, te1, te2, vae or other."""
    return next((name for name, root in PART_ROOTS.items() if tensor.startswith(root)), "other")
