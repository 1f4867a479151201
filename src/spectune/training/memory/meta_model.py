"""Models and frames on torch's meta device, with shapes and dtypes but without values or memory."""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from spectune.core.low_rank import LowRank
from spectune.model.network import Sdxl, new_unet, new_vae, text_config
from spectune.model.prediction import make_prediction
from spectune.sdxl.layers import Layer
from spectune.sdxl.layout import Layout

META = torch.device("meta")


def empty_model(layout: Layout, dtype: torch.dtype) -> Sdxl:
    """Return a model with the layout on the meta device, with the dtypes of `build_model`."""
    with init_empty_weights(include_buffers=False):
        unet = new_unet(layout.unet)
        te1 = CLIPTextModel(text_config(layout.te1))
        te2 = CLIPTextModelWithProjection(text_config(layout.te2))
        vae = None if layout.vae is None else new_vae(layout.vae)
    modules: tuple[nn.Module, ...] = (unet, te1, te2)
    for module in modules:
        # the `to` of diffusers would warn about each cast
        nn.Module.to(module, device=META, dtype=dtype).requires_grad_(False).eval()
    if vae is not None:
        nn.Module.to(vae, META).requires_grad_(False).eval()  # float32, as in build_model
    return Sdxl(unet=unet, te1=te1, te2=te2, vae=vae, layout=layout, prediction=make_prediction("eps"))


def empty_frame(layer: Layer, rank: int) -> LowRank:
    """Return a frame of float32 factors on the meta device."""
    ones = (1,) * (len(layer.shape) - 2)
    return LowRank(
        down=torch.empty((rank, *layer.shape[1:]), device=META),
        up=torch.empty((layer.shape[0], rank, *ones), device=META),
        alpha=float(rank),
    )
