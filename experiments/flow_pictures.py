"""Measure the distance between the images of a converted model and those of its original EPS model.

Flow sampling integrates dx/ds = v(x, s) from noise at s = 1. Through the exact bridge, the EPS model has such
a v too. If the velocities of both models agree, they generate the same image from the same noise. The
distance is |difference of the latents| / |latents of the EPS model|. It needs no network that judges images
and no statistics of many samples, and a perfect conversion has the distance 0. Images are sampled with
Euler's method, without guidance, and with shift 2.5.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from spectune.checkpoints.open import open_checkpoint
from spectune.model.network import Sdxl, build_model
from spectune.model.prediction import Flow
from spectune.model.text import tokenize
from spectune.sampling.generate import Request, SampleSettings, make_scheduler, sample_latents, to_images
from spectune.training.eps_to_flow.bridge import Bridge

SHIFT, STEPS, EDGE_PX = 2.5, 20, 64
SETTINGS = SampleSettings(width=EDGE_PX, height=EDGE_PX, steps=STEPS, cfg=1.0)
SHOWN = 6  # images in a strip
BATCH = 30


def captions_of(folder: Path, count: int = 24) -> list[str]:
    """Return the first captions of a folder of images."""
    return [path.read_text(encoding="utf-8").strip() for path in sorted(folder.glob("*.txt"))[:count]]


@torch.no_grad()
def as_eps(model: Sdxl, captions: Sequence[str], *, first_seed: int = 0) -> Tensor:
    """Return latents of the EPS model by flow sampling through the bridge, (captions, channels, h, w)."""
    scheduler = make_scheduler(Flow(SHIFT), "euler", pixels=EDGE_PX**2)
    scheduler.set_timesteps(STEPS)
    x = torch.stack([_noise(model, first_seed + number) for number in range(len(captions))])
    text = model.encode_text(tokenize(list(captions), model.layout.te1.context))
    time_ids = torch.tensor([[EDGE_PX, EDGE_PX, 0, 0, EDGE_PX, EDGE_PX]]).float().expand(len(x), -1)
    bridge = Bridge()
    for timestep in scheduler.timesteps:
        coefficients = bridge.at((timestep / 1000).expand(len(x)))
        output = model.denoise(coefficients.network_input(x), coefficients.timestep, text, time_ids)
        x = scheduler.step(coefficients.velocity(output, x), timestep, x).prev_sample
    return x


def draw_own(base: Path, flat: Path, target: Path) -> None:
    """Generate an image set with the EPS base, from the captions of the flat set.

    The validation images are those of the flat set.
    """
    if target.exists():
        return
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "train").mkdir(parents=True)
    shutil.copytree(flat / "held_out", partial / "held_out")
    with open_checkpoint(base) as source:
        model = build_model(source)
    captions = captions_of(flat / "train", count=10**6)
    for start in range(0, len(captions), BATCH):
        chunk = captions[start : start + BATCH]
        pictures = to_images(model.decode_latents(as_eps(model, chunk, first_seed=start)))
        for number, (caption, picture) in enumerate(zip(chunk, pictures, strict=True), start=start):
            picture.save(partial / "train" / f"{number:03d}.webp", lossless=True)
            (partial / "train" / f"{number:03d}.txt").write_text(caption, encoding="utf-8")
    partial.rename(target)


def as_flow(model: Sdxl, captions: Sequence[str]) -> Tensor:
    """Return latents of a flow model, sampled from the same noise."""
    requests = [Request(caption, seed) for seed, caption in enumerate(captions)]
    return sample_latents(replace(model, prediction=Flow(SHIFT)), requests, SETTINGS)


def reference(base: Path, captions: Sequence[str], work: Path) -> Tensor:
    """Return the latents of the EPS base, cached in the work folder."""
    file = work / "eps_pictures.pt"
    if not file.exists():
        with open_checkpoint(base) as source:
            latents = as_eps(build_model(source), captions)
        partial = file.with_suffix(f".{id(latents)}")
        torch.save(latents, partial)
        partial.replace(file)
    return torch.load(file, weights_only=True)


def distance(latents: Tensor, target: Tensor) -> float:
    return float((latents - target).norm() / target.norm())


@torch.no_grad()
def strip(model: Sdxl, latents: Tensor) -> Image.Image:
    """Return the first images in a row, at twice their size."""
    pictures = to_images(model.decode_latents(latents[:SHOWN]))
    sheet = Image.new("RGB", (2 * EDGE_PX * len(pictures), 2 * EDGE_PX), "white")
    for column, picture in enumerate(pictures):
        sheet.paste(
            picture.resize((2 * EDGE_PX, 2 * EDGE_PX), Image.Resampling.LANCZOS), (2 * EDGE_PX * column, 0)
        )
    return sheet


def _noise(model: Sdxl, seed: int) -> Tensor:
    edge = EDGE_PX // model.pixels_per_latent
    shape = (model.layout.unet.in_channels, edge, edge)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
