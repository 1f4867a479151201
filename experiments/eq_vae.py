"""Fine-tune the VAE of the demo so that rotated or scaled latents decode to rotated or scaled images.

EQ-VAE (Kouzelis et al. 2025, arXiv 2502.09509, section 3): the decoder is trained on plain latents and on
downsampled or rotated latents. The target is the image, transformed in the same way. A new scale and shift
give latents = (z - shift) * scale with mean 0 and standard deviation 1.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from experiments.lab import BASE, picture_folder
from spectune.checkpoints.open import open_checkpoint
from spectune.model.network import build_model
from spectune.sdxl.inference import infer_layout
from spectune.sdxl.layout import hints_metadata

STEPS, BATCH, RATE = 500, 8, 3e-4
SIZES = (4, 8, 12)  # edges to which latents of 16 are downsampled
FILE, FACTS = "eq_vae.safetensors", "eq_vae.json"


def pixels_of(folder: Path) -> Tensor:
    """Return all images of a folder, (images, 3, 64, 64) in -1..1."""
    rows = [
        torch.tensor(list(Image.open(path).convert("RGB").tobytes()))
        for path in sorted(folder.glob("*.webp"))
    ]
    return torch.stack(rows).view(-1, 64, 64, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


def transformed(latents: Tensor, pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rotate both by a random multiple of 90 degrees and downsample them to one of SIZES, or not at all."""
    turns = int(torch.randint(4, (), generator=generator))
    latents, pixels = (torch.rot90(tensor, turns, (2, 3)) for tensor in (latents, pixels))
    choice = int(torch.randint(len(SIZES) + 1, (), generator=generator))
    if choice == len(SIZES):
        return latents, pixels
    edge = SIZES[choice]
    step = pixels.shape[-1] // latents.shape[-1]
    return (
        F.interpolate(latents, size=edge, mode="area"),
        F.interpolate(pixels, size=edge * step, mode="area"),
    )


def loss_of(vae: AutoencoderKL, pixels: Tensor, generator: torch.Generator) -> Tensor:
    posterior = cast("Any", vae.encode(pixels)).latent_dist
    latents = posterior.sample(generator)
    decoder = cast("Any", vae)
    loss = 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
    for z, x in ((latents, pixels), transformed(latents, pixels, generator)):
        out = decoder.decode(z).sample
        loss = loss + F.l1_loss(out, x) + F.mse_loss(out, x)
    return loss


@torch.no_grad()
def equivariance(vae: AutoencoderKL, pixels: Tensor) -> dict[str, float]:
    """Return the PSNR in dB of reconstructions, and of images from rotated and from halved latents."""
    latents = cast("Any", vae.encode(pixels)).latent_dist.mode()
    pairs = {
        "as_it_is": (latents, pixels),
        "turned": (torch.rot90(latents, 1, (2, 3)), torch.rot90(pixels, 1, (2, 3))),
        "halved": (F.avg_pool2d(latents, 2), F.avg_pool2d(pixels, 2)),
    }
    return {
        name: 10 * math.log10(4 / float(F.mse_loss(cast("Any", vae.decode(z)).sample.clamp(-1, 1), x)))
        for name, (z, x) in pairs.items()
    }


def make(work: Path) -> None:
    """Write the VAE to the work folder, unless it exists."""
    if (work / FACTS).exists():
        return
    torch.manual_seed(0)
    with open_checkpoint(BASE) as source:
        vae, layout = build_model(source).vae, hints_metadata(infer_layout(source))
    assert isinstance(vae, AutoencoderKL)
    folders = [picture_folder(pictures, work) for pictures in ("flat", "three_d")]
    pixels = torch.cat([pixels_of(folder / "train") for folder in folders])
    validation = torch.cat([pixels_of(folder / "held_out") for folder in folders])
    before = equivariance(vae, validation)
    vae.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 + math.cos(math.pi * step / STEPS)) / 2
        rows = torch.randint(len(pixels), (BATCH,), generator=generator)
        loss_of(vae, pixels[rows], generator).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        latents = torch.cat([cast("Any", vae.encode(chunk)).latent_dist.mode() for chunk in pixels.split(64)])
    facts = {
        "scale": 1 / float(latents.std()),
        "shift": float(latents.mean()),
        "before": before,
        "after": equivariance(vae, validation),
    }
    weights = {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}
    save_file(weights, work / FILE, metadata=layout)  # the layout gives the number of norm groups
    (work / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
