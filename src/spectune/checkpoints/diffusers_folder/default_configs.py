"""Build new configurations for a diffusers folder from the layout of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spectune.checkpoints.diffusers_folder.config import TE1, TE2, UNET, VAE, Schedule
from spectune.errors import InputError
from spectune.sdxl.layout import TIME_IDS, Layout, TextLayout, UNetLayout, VaeLayout
from spectune.sdxl.vocabulary import BOS_ID, EOS_ID

DIFFUSERS_VERSION = "0.36.0"  # the version whose configuration format is written
NO_COMPONENT = [None, None]  # the entry of model_index.json for an absent component
PIPELINE: Mapping[str, Any] = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": DIFFUSERS_VERSION,
    "force_zeros_for_empty_prompt": True,  # as in the training of the base model
}
COMPONENTS: Mapping[str, list[str]] = {
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def model_configs(layout: Layout) -> dict[str, dict[str, Any]]:
    """Return the configurations of the modules by path in the folder.

    Raises InputError for a UNet that diffusers cannot describe.
    """
    configs = {
        UNET: _unet_config(layout.unet),
        TE1: _text_config(layout.te1, "CLIPTextModel"),
        TE2: _text_config(layout.te2, "CLIPTextModelWithProjection"),
    }
    return configs if layout.vae is None else configs | {VAE: _vae_config(layout.vae)}


def _unet_config(unet: UNetLayout) -> dict[str, Any]:
    if unet.depths[-1] not in (0, unet.mid_depth):
        raise InputError(
            f"diffusers cannot describe this UNet: its middle has {unet.mid_depth} transformer blocks, its "
            f"deepest level {unet.depths[-1]}: expected the same number",
            hint="write a .safetensors file instead",
        )
    kinds = ["CrossAttn" if depth else "" for depth in unet.depths]
    # The last number is also the depth of the middle, even if the deepest level has no transformers.
    depths = [*(max(depth, 1) for depth in unet.depths[:-1]), max(unet.mid_depth, 1)]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": unet.time_id_channels,
        "attention_head_dim": list(unet.heads),  # diffusers' name for the number of heads
        "block_out_channels": list(unet.channels),
        "cross_attention_dim": unet.context,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "in_channels": unet.in_channels,
        "layers_per_block": unet.resnets,
        "norm_num_groups": unet.norm_groups,
        "out_channels": unet.out_channels,
        "projection_class_embeddings_input_dim": unet.pooled + TIME_IDS * unet.time_id_channels,
        "sample_size": 128,  # latents of 1024 pixels, SDXL's default image size
        "transformer_layers_per_block": depths,
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "use_linear_projection": True,
    }


def _text_config(text: TextLayout, kind: str) -> dict[str, Any]:
    return {
        "architectures": [kind],
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "hidden_act": text.activation,
        "hidden_size": text.width,
        "intermediate_size": text.mlp,
        "max_position_embeddings": text.context,
        "model_type": "clip_text_model",
        "num_attention_heads": text.heads,
        "num_hidden_layers": text.layers,
        "projection_dim": text.projection or text.width,
        "vocab_size": text.vocab,
    }


def _vae_config(vae: VaeLayout) -> dict[str, Any]:
    levels = len(vae.channels)
    without = {} if vae.quant_convs else {"use_quant_conv": False, "use_post_quant_conv": False}
    return without | {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "block_out_channels": list(vae.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,  # SDXL's VAE overflows in float16
        "in_channels": 3,
        "latent_channels": vae.latent_channels,
        "layers_per_block": vae.resnets,
        "norm_num_groups": vae.norm_groups,
        "out_channels": 3,
        "sample_size": 1024,
        "scaling_factor": vae.scale,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def scheduler_config(schedule: Schedule) -> dict[str, Any]:
    """Return the configuration of a scheduler with SDXL's noise that StableDiffusionXLPipeline supports."""
    common = {
        "_diffusers_version": DIFFUSERS_VERSION,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "rescale_betas_zero_snr": schedule.zero_snr,
    }
    if schedule.prediction == "flow":
        # EulerDiscreteScheduler does not support flow; FlowMatchEulerDiscreteScheduler fails with SDXL.
        return common | {
            "_class_name": "DPMSolverMultistepScheduler",
            "flow_shift": 1.0 if schedule.flow_shift is None else schedule.flow_shift,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
        }
    return common | {
        "_class_name": "EulerDiscreteScheduler",
        "prediction_type": "v_prediction" if schedule.prediction == "v" else "epsilon",
        "steps_offset": 1,
        # A zero-SNR model starts from pure noise at the last timestep; only trailing spacing includes it.
        "timestep_spacing": "trailing" if schedule.zero_snr else "leading",
    }
