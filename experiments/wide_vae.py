"""Train an autoencoder with 16 latent channels from scratch, on both image sets.

It has the compression of the demo's autoencoder (4 px per latent), half its widths and no weight of it. The
latents get a scale and a shift such that latents = (z - shift) * scale have mean 0 and standard deviation 1.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from experiments.eq_vae import pixels_of
from experiments.lab import BASE, picture_folder
from spectune.checkpoints.open import open_checkpoint
from spectune.files.provenance import Provenance
from spectune.model.network import new_vae
from spectune.sdxl.inference import infer_layout
from spectune.sdxl.layout import VaeLayout, hints_metadata

CHANNELS = 16
LAYOUT = VaeLayout(
    channels=(8, 16, 32), resnets=1, latent_channels=CHANNELS, norm_groups=4, scale=1.0, shift=0.0
)
STEPS, RATE = 1500, 2e-3
CROP_PX, CROPS, WHOLE = 32, 16, 8  # batches of crops, and of whole images in the last fifth of the steps
FILE, FACTS = "wide_vae.safetensors", "wide_vae.json"


def batch_of(pixels: Tensor, step: int, generator: torch.Generator) -> Tensor:
    """Return random crops, or whole images in the last fifth, (batch, 3, edge, edge)."""
    if step >= 0.8 * STEPS:
        return pixels[torch.randint(len(pixels), (WHOLE,), generator=generator)]
    rows = torch.randint(len(pixels), (CROPS,), generator=generator).tolist()
    room = pixels.shape[-1] - CROP_PX
    corners = torch.randint(room + 1, (CROPS, 2), generator=generator).tolist()
    return torch.stack(
        [
            pixels[row, :, top : top + CROP_PX, left : left + CROP_PX]
            for row, (top, left) in zip(rows, corners, strict=True)
        ]
    )


def rate_at(step: int) -> float:
    """Return the learning rate: warm-up over 50 steps, then half a cosine to 0."""
    return RATE * min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * step / STEPS)) / 2


def train(vae: AutoencoderKL, pixels: Tensor) -> None:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate_at(step)
        x = batch_of(pixels, step, generator).contiguous(memory_format=torch.channels_last)
        posterior = cast("Any", vae.encode(x)).latent_dist
        out = cast("Any", vae).decode(posterior.sample(generator)).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        (F.l1_loss(out, x) + F.mse_loss(out, x) + 1e-4 * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Return the PSNR of reconstructions in dB."""
    latents = cast("Any", vae.encode(pixels)).latent_dist.mode()
    out = cast("Any", vae).decode(latents).sample.clamp(-1, 1)
    return 10 * math.log10(4 / float(F.mse_loss(out, pixels)))


def make(work: Path) -> None:
    """Write the autoencoder to the work folder, unless it exists."""
    if (work / FACTS).exists():
        return
    torch.manual_seed(0)
    with open_checkpoint(BASE) as source:
        base = infer_layout(source)
    vae = cast("AutoencoderKL", new_vae(LAYOUT))
    cast("Any", vae).to(memory_format=torch.channels_last)
    vae.train()
    folders = [picture_folder(pictures, work) for pictures in ("flat", "three_d")]
    pixels = torch.cat([pixels_of(folder / "train") for folder in folders])
    train(vae, pixels)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        latents = torch.cat([cast("Any", vae.encode(chunk)).latent_dist.mode() for chunk in pixels.split(64)])
    validation = torch.cat([pixels_of(folder / "held_out") for folder in folders])
    scale, shift = 1 / float(latents.std()), float(latents.mean())
    facts = {"scale": scale, "shift": shift, "psnr": psnr(vae, validation)}
    weights = {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}
    declared = Provenance(vae_scale=scale, vae_shift=shift).to_metadata()
    # the layout gives the number of norm groups
    save_file(weights, work / FILE, metadata=hints_metadata(replace(base, vae=LAYOUT)) | declared)
    (work / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
