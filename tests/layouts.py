"""Layouts for tests, and their modules built by diffusers and transformers."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from spectune.sdxl.layout import SDXL, Layout, PartName, TextLayout, UNetLayout, VaeLayout
from spectune.sdxl.state_dicts import single_file_tensors

# Covers every code path of the full model: a level without transformers, levels of different depth and of
# equal width, a projection that is not square, a VAE with and without shortcuts.
TINY = Layout(
    unet=UNetLayout(
        channels=(16, 16, 32),
        depths=(0, 1, 2),
        mid_depth=2,
        resnets=1,
        in_channels=4,
        out_channels=4,
        context=40,
        heads=(1, 2, 4),
        time_id_channels=8,
        pooled=20,
        norm_groups=8,
    ),
    te1=TextLayout(
        width=16, layers=2, heads=2, mlp=32, vocab=49408, context=77, projection=None, activation="quick_gelu"
    ),
    te2=TextLayout(
        width=24, layers=2, heads=3, mlp=48, vocab=49408, context=77, projection=20, activation="gelu"
    ),
    vae=VaeLayout(
        channels=(8, 16, 16), resnets=1, latent_channels=4, norm_groups=4, scale=0.13025, shift=0.0
    ),
)
FULL = SDXL


@dataclass(frozen=True)
class Modules:
    """The running modules of a layout, built by diffusers and transformers."""

    layout: Layout
    unet: nn.Module
    te1: nn.Module
    te2: nn.Module
    vae: nn.Module

    def states(self) -> dict[PartName, dict[str, Tensor]]:
        parts: dict[PartName, nn.Module] = {
            "unet": self.unet,
            "te1": self.te1,
            "te2": self.te2,
            "vae": self.vae,
        }
        return {part: module.state_dict() for part, module in parts.items()}

    def single_file(self) -> dict[str, Tensor]:
        states = self.states()
        return single_file_tensors(self.layout, states["unet"], states["te1"], states["te2"], states["vae"])


def build_modules(layout: Layout) -> Modules:
    """Return randomly initialized modules, built by the libraries without spectune's tables."""
    assert layout.vae is not None
    return Modules(
        layout,
        unet=_unet(layout.unet),
        te1=CLIPTextModel(_text_config(layout.te1)),
        te2=CLIPTextModelWithProjection(_text_config(layout.te2)),
        vae=_vae(layout.vae),
    )


def _unet(unet: UNetLayout) -> UNet2DConditionModel:
    kinds = ["CrossAttn" if depth else "" for depth in unet.depths]
    return UNet2DConditionModel(
        block_out_channels=unet.channels,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        transformer_layers_per_block=tuple(max(depth, 1) for depth in unet.depths),
        attention_head_dim=unet.heads,  # diffusers' name for the number of heads
        cross_attention_dim=unet.context,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=unet.time_id_channels,
        projection_class_embeddings_input_dim=unet.pooled + 6 * unet.time_id_channels,
        layers_per_block=unet.resnets,
        norm_num_groups=unet.norm_groups,
    )


def _text_config(text: TextLayout) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=text.vocab,
        hidden_size=text.width,
        intermediate_size=text.mlp,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        hidden_act=text.activation,
        projection_dim=text.projection or text.width,
        bos_token_id=49406,
        eos_token_id=49407,
    )


def _vae(vae: VaeLayout) -> AutoencoderKL:
    levels = len(vae.channels)
    return AutoencoderKL(
        block_out_channels=vae.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=vae.resnets,
        norm_num_groups=vae.norm_groups,
        latent_channels=vae.latent_channels,
    )
