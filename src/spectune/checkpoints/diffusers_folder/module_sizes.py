"""The sizes of the modules of a diffusers folder, inferred from their state dicts.

The same reading as layout.py's in another spelling: the one table of names is generated from a layout, so the
layout must be known before a folder's tensors can be called by their single-file names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count, takewhile

from spectune.checkpoints.diffusers_folder.keys import SUBFOLDERS
from spectune.errors import InputError
from spectune.files.source import TensorInfo
from spectune.sdxl.layout import (
    HEAD_CHANNELS,
    NORM_GROUPS,
    SDXL_VAE_SCALE,
    SDXL_VAE_SHIFT,
    TIME_IDS,
    Layout,
    TextLayout,
    UNetLayout,
    VaeLayout,
)
from spectune.sdxl.names import ModuleName

NOT_SDXL_FOLDER = "spectune reads folders of StableDiffusionXLPipeline"

Shapes = Mapping[str, TensorInfo]


def folder_layout(states: Mapping[ModuleName, Shapes], label: str) -> Layout:
    """The layout of the modules with these state dicts, of which the VAE may be absent.

    Heads, norm groups and the VAE's factors are SDXL's: tensors do not tell them, no name depends on them.
    Raises InputError when a tensor that every SDXL has is missing.
    """
    te2 = _text(_ModuleProbe(states["te2"], "te2", label), "text_model.", projected=True)
    te1 = _text(_ModuleProbe(states["te1"], "te1", label), "", projected=False)
    vae = states.get("vae")
    return Layout(
        unet=_unet(_ModuleProbe(states["unet"], "unet", label), te2.projection or 0),
        te1=te1,
        te2=te2,
        vae=None if vae is None else _vae(_ModuleProbe(vae, "vae", label)),
    )


class _ModuleProbe:
    """Asks for the tensors of one subfolder."""

    def __init__(self, tensors: Shapes, part: ModuleName, label: str) -> None:
        self.tensors = tensors
        self.where = f"{SUBFOLDERS[part]}/ of {label}"

    def shape(self, key: str, axes: int) -> tuple[int, ...]:
        if key not in self.tensors:
            raise InputError(f"{self.where} is not laid out like SDXL: no {key}", hint=NOT_SDXL_FOLDER)
        shape = self.tensors[key].shape
        if len(shape) != axes:
            raise self.wrong(f"{key} has the shape {shape}, expected {axes} axes")
        return shape

    def run(self, key: Callable[[int], str]) -> int:
        """How many of key(0), key(1), ... there are without a gap."""
        return sum(1 for _ in takewhile(lambda n: key(n) in self.tensors, count()))

    def wrong(self, what: str) -> InputError:
        return InputError(f"{self.where} is not laid out like SDXL: {what}", hint=NOT_SDXL_FOLDER)


def _unet(probe: _ModuleProbe, pooled: int) -> UNetLayout:
    levels = probe.run(lambda n: f"down_blocks.{n}.resnets.0.conv1.weight")
    channels = tuple(
        probe.shape(f"down_blocks.{n}.resnets.0.conv1.weight", 4)[0] for n in range(max(levels, 1))
    )
    resnets = [_count(probe, f"down_blocks.{level}.resnets", "conv1.weight") for level in range(levels)]
    if len(set(resnets)) > 1:
        raise probe.wrong(f"its levels have {resnets} resnets, expected the same number")
    embed_in = probe.shape("add_embedding.linear_1.weight", 2)[1]
    if embed_in <= pooled or (embed_in - pooled) % TIME_IDS:
        raise probe.wrong(f"add_embedding takes {embed_in} channels, expected {pooled} + {TIME_IDS} x n")
    mid = "mid_block.attentions.0.transformer_blocks"
    return UNetLayout(
        channels=channels,
        depths=tuple(_depth(probe, level, resnets[0]) for level in range(levels)),
        mid_depth=_count(probe, mid, "norm1.weight"),
        resnets=resnets[0],
        in_channels=probe.shape("conv_in.weight", 4)[1],
        out_channels=probe.shape("conv_out.weight", 4)[0],
        context=probe.shape(f"{mid}.0.attn2.to_k.weight", 2)[1],
        heads=tuple(_default_heads(n) for n in channels),
        time_id_channels=(embed_in - pooled) // TIME_IDS,
        pooled=pooled,
        norm_groups=NORM_GROUPS,
    )


def _count(probe: _ModuleProbe, stem: str, end: str) -> int:
    return probe.run(lambda n: f"{stem}.{n}.{end}")


def _depth(probe: _ModuleProbe, level: int, resnets: int) -> int:
    depths = {
        _count(probe, f"down_blocks.{level}.attentions.{n}.transformer_blocks", "norm1.weight")
        for n in range(resnets)
    }
    if len(depths) > 1:
        raise probe.wrong(f"transformers of different depth in down_blocks.{level}: {sorted(depths)}")
    return depths.pop()


def _text(probe: _ModuleProbe, root: str, *, projected: bool) -> TextLayout:
    vocab, width = probe.shape(f"{root}embeddings.token_embedding.weight", 2)
    return TextLayout(
        width=width,
        layers=_count(probe, f"{root}encoder.layers", "mlp.fc1.weight"),
        heads=_default_heads(width),
        mlp=probe.shape(f"{root}encoder.layers.0.mlp.fc1.weight", 2)[0],
        vocab=vocab,
        context=probe.shape(f"{root}embeddings.position_embedding.weight", 2)[0],
        projection=probe.shape("text_projection.weight", 2)[0] if projected else None,
        activation="gelu" if projected else "quick_gelu",
    )


def _vae(probe: _ModuleProbe) -> VaeLayout:
    down = "encoder.down_blocks"
    levels = probe.run(lambda n: f"{down}.{n}.resnets.0.conv1.weight")
    return VaeLayout(
        channels=tuple(
            probe.shape(f"{down}.{n}.resnets.0.conv1.weight", 4)[0] for n in range(max(levels, 1))
        ),
        resnets=_count(probe, f"{down}.0.resnets", "conv1.weight"),
        latent_channels=probe.shape("post_quant_conv.weight", 4)[0],
        norm_groups=NORM_GROUPS,
        scale=SDXL_VAE_SCALE,
        shift=SDXL_VAE_SHIFT,
    )


def _default_heads(width: int) -> int:
    return max(width // HEAD_CHANNELS, 1)
