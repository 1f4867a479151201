"""Train the embedded base from scratch: a tiny but complete SDXL on Microsoft's Fluent emoji.

    python demo/train_base.py --flat fluent_flat.tar --three-d fluent_3d.tar --work base_run

The two archives contain 128 px WebP images on white, each with a caption (`cat.webp`, `cat.txt`), rasterized
from the npm packages fluentui-emoji 1.3.0 and @lobehub/fluent-emoji-3d 1.1.0 (MIT, Copyright (c) Microsoft
Corporation). The VAE is trained on both styles, the UNet and the text encoders only on the flat one. Each
stage saves a checkpoint in the work folder and resumes from it. The last stage writes base.safetensors.
"""

from __future__ import annotations

import argparse
import copy
import io
import math
import tarfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from spectune.files.provenance import Provenance, Role
from spectune.files.writer import write_tensors
from spectune.model.network import new_unet, new_vae, text_config
from spectune.model.text import TokenIds, tokenize
from spectune.sdxl.layout import Layout, TextLayout, UNetLayout, VaeLayout, hints_metadata
from spectune.sdxl.state_dicts import single_file_tensors

PIXELS = 64
BATCH = 64  # batch size of the denoiser
SDXL_SCALE = 0.13025  # the VAE is rescaled at the end to SDXL's own factor

_TEXT = {"layers": 3, "vocab": 49408, "context": 77}
_TE1 = TextLayout(width=32, heads=4, mlp=128, projection=None, activation="quick_gelu", **_TEXT)
_TE2 = TextLayout(width=40, heads=5, mlp=160, projection=40, activation="gelu", **_TEXT)
_UNET = UNetLayout(
    channels=(64, 64, 128),
    depths=(0, 1, 1),
    mid_depth=1,
    resnets=2,
    in_channels=4,
    out_channels=4,
    context=_TE1.width + _TE2.width,
    heads=(2, 2, 4),
    time_id_channels=32,
    pooled=40,
    norm_groups=32,
)
_VAE = VaeLayout(
    channels=(16, 32, 64), resnets=2, latent_channels=4, norm_groups=8, scale=SDXL_SCALE, shift=0.0
)
LAYOUT = Layout(unet=_UNET, te1=_TE1, te2=_TE2, vae=_VAE)


def layout_of(width: int) -> Layout:
    """Return the layout with `width` times the channels and the heads of the UNet."""
    channels, heads = (tuple(width * one for one in ones) for ones in (_UNET.channels, _UNET.heads))
    return replace(LAYOUT, unet=replace(_UNET, channels=channels, heads=heads))


@dataclass(frozen=True)
class Picture:
    name: str
    caption: str
    pixels: Tensor  # float32 (3, 64, 64) in -1..1


def read_pictures(archive: Path) -> list[Picture]:
    """Read all captioned images of a tar archive, scaled to 64 px, in the order of their names."""
    with tarfile.open(archive) as tar:
        members = {m.name: m for m in tar.getmembers() if m.isfile()}
        images = sorted(name for name in members if name.endswith(".webp"))
        return [_read_picture(tar, members, name) for name in images]


def _read_picture(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], name: str) -> Picture:
    image = Image.open(io.BytesIO(tar.extractfile(members[name]).read())).convert("RGB")
    image = image.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(PIXELS, PIXELS, 3).permute(2, 0, 1).float() / 127.5 - 1
    caption = tar.extractfile(members[name[: -len(".webp")] + ".txt"]).read().decode().strip()
    return Picture(Path(name).stem, caption, pixels)


class Denoiser(torch.nn.Module):
    """UNet and both text encoders, trained together."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.unet = new_unet(layout.unet)
        self.te1 = CLIPTextModel(text_config(layout.te1))
        self.te2 = CLIPTextModelWithProjection(text_config(layout.te2))

    def forward(self, x: Tensor, timestep: Tensor, ids: TokenIds, time_ids: Tensor) -> Tensor:
        first = self.te1(ids.te1, output_hidden_states=True).hidden_states[-2]
        second = self.te2(ids.te2, output_hidden_states=True)
        context = torch.cat([first, second.hidden_states[-2]], dim=-1)
        added = {"text_embeds": second.text_embeds, "time_ids": time_ids}
        return self.unet(x, timestep, context, added_cond_kwargs=added).sample


class Average:
    """Exponential moving average of a module's parameters, with a smaller decay at the start."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, module: torch.nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)


def rate(step: int, steps: int, peak: float, warmup_steps: int = 200) -> float:
    """Return the learning rate: linear warm-up, constant, linear decay over the last third."""
    return peak * min((step + 1) / warmup_steps, 1.0, 3 * (steps - step) / steps)


class Run:
    """One stage: a module, its average and its optimizer, saved to a file and resumed from it."""

    def __init__(self, module: torch.nn.Module, file: Path, steps: int, peak: float, decay: float) -> None:
        self.module, self.file, self.steps, self.peak = module, file, steps, peak
        self.average = Average(module, decay)
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=peak, weight_decay=0.0, fused=True)
        self.step = 0
        self.loss_mean = math.nan
        self.started = time.monotonic()
        if file.exists():
            state = torch.load(file, weights_only=True)
            module.load_state_dict(state["module"])
            self.average.module.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def save(self) -> None:
        partial = self.file.with_suffix(".partial")
        torch.save(
            {
                "module": self.module.state_dict(),
                "average": self.average.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
            },
            partial,
        )
        partial.replace(self.file)

    def update(self, loss: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.step, self.steps, self.peak)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.module, self.step)
        self.step += 1
        value = loss.item()
        self.loss_mean = value if math.isnan(self.loss_mean) else 0.98 * self.loss_mean + 0.02 * value

    def line(self) -> str:
        minutes = (time.monotonic() - self.started) / 60
        return f"{self.file.stem} step {self.step}/{self.steps} loss {self.loss_mean:.5f} {minutes:.1f} min"


def psnr(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Return the PSNR in dB of reconstructions of pixels in -1..1 (peak to peak 2)."""
    with torch.no_grad():
        out = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    return 10 * math.log10(4 / F.mse_loss(out, pixels).item())


def crops(pixels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return random crops (batch, 3, size, size), half of them mirrored, mostly without the white margin."""
    low, high = (0, PIXELS - size) if size == PIXELS else (4, PIXELS - size - 4)
    offsets = torch.randint(low, high + 1, (len(pixels), 2), generator=generator).tolist()
    cut = [p[:, top : top + size, left : left + size] for p, (top, left) in zip(pixels, offsets, strict=True)]
    mirrored = torch.rand(len(cut), generator=generator).lt(0.5).tolist()
    return torch.stack([c.flip(-1) if flip else c for c, flip in zip(cut, mirrored, strict=True)])


def train_vae(pictures: list[Picture], work: Path, steps: int) -> AutoencoderKL:
    """Train the VAE on random 32 px crops, and on whole images for the last fifth of the steps."""
    pixels = torch.stack([p.pixels for p in pictures])
    vae = new_vae(LAYOUT.vae).to(memory_format=torch.channels_last)
    run = Run(vae, work / "vae.pt", steps, peak=2e-3, decay=0.998)
    generator = torch.Generator().manual_seed(run.step)
    while run.step < steps:
        size, batch = (32, 24) if run.step < 0.8 * steps else (PIXELS, 8)
        rows = torch.randint(len(pixels), (batch,), generator=generator)
        x = crops(pixels[rows], size, generator).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        out = vae.decode(posterior.sample(generator)).sample
        run.update(
            F.l1_loss(out, x) + F.mse_loss(out, x) + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        )
        if run.step % 250 == 0 or run.step == steps:
            run.save()
            quality = psnr(run.average.module, pixels[:: len(pixels) // 96])
            print(f"{run.line()} psnr {quality:.2f} dB", flush=True)
    return run.average.module


def rescale_latents(vae: AutoencoderKL, pixels: Tensor) -> AutoencoderKL:
    """Scale the 1x1 convolutions around the latents to unit variance of latents * 0.13025."""
    with torch.no_grad():
        latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in pixels.split(64)])
        factor = 1 / (SDXL_SCALE * latents.std())
        mean_rows = slice(0, 4)
        vae.quant_conv.weight[mean_rows] *= factor
        vae.quant_conv.bias[mean_rows] *= factor
        vae.quant_conv.bias[4:] += 2 * factor.log()  # log variance
        vae.post_quant_conv.weight /= factor
    return vae


def encode_all(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Return mean and standard deviation of all scaled latents, float32 (images, 2, 4, 16, 16)."""
    with torch.no_grad():
        posteriors = [vae.encode(chunk).latent_dist for chunk in pixels.split(64)]
    return SDXL_SCALE * torch.cat([torch.stack([p.mean, p.std], dim=1) for p in posteriors])


def train_denoiser(
    pictures: list[Picture], vae: AutoencoderKL, work: Path, steps: int, layout: Layout
) -> Denoiser:
    """Train with the EPS objective and min-SNR weighting (gamma 5); a tenth of the captions is dropped."""
    latents = encode_all(vae, torch.stack([p.pixels for p in pictures]))
    ids = tokenize([p.caption for p in pictures] + [""])
    denoiser = Denoiser(layout)
    denoiser.unet.to(memory_format=torch.channels_last)
    run = Run(denoiser, work / "denoiser.pt", steps, peak=1e-3, decay=0.9995)
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    weights = snr.clamp(max=5) / snr
    generator = torch.Generator().manual_seed(run.step)
    order: list[int] = []
    while run.step < steps:
        if len(order) < BATCH:
            order += torch.randperm(len(pictures), generator=generator).tolist()
        rows, order = torch.tensor(order[:BATCH]), order[BATCH:]
        mean, std = latents[rows].unbind(1)
        x0 = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        timestep = torch.randint(1000, (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, generator=generator).lt(0.1)
        captions = torch.where(dropped, len(pictures), rows)
        batch_ids = TokenIds(ids.te1[captions], ids.te2[captions])
        out = denoiser(
            schedule.add_noise(x0, noise, timestep).contiguous(memory_format=torch.channels_last),
            timestep,
            batch_ids,
            random_time_ids(BATCH, generator),
        )
        run.update(((out - noise).square().mean((1, 2, 3)) * weights[timestep]).mean())
        if run.step % 200 == 0 or run.step == steps:
            run.save()
            print(run.line(), flush=True)
    return run.average.module


def random_time_ids(batch: int, generator: torch.Generator) -> Tensor:
    """Return SDXL's six sizes: a random square original of 64 to 256 px, no crop, 64 px target."""
    original = torch.randint(PIXELS, 4 * PIXELS + 1, (batch, 1), generator=generator).expand(-1, 2)
    fixed = torch.tensor([0, 0, PIXELS, PIXELS]).expand(batch, -1)
    return torch.cat([original, fixed], dim=1).float()


@torch.no_grad()
def zero_unseen_tokens(denoiser: Denoiser, captions: list[str]) -> None:
    """Set the embeddings of tokens that occur in no caption to zero; they still have random values."""
    ids = tokenize([*captions, ""])
    for encoder, seen in ((denoiser.te1, ids.te1), (denoiser.te2, ids.te2)):
        weight = encoder.get_input_embeddings().weight
        unseen = torch.ones(len(weight), dtype=torch.bool).index_fill(0, seen.unique(), False)
        weight[unseen] = 0


def write_base(denoiser: Denoiser, vae: AutoencoderKL, path: Path) -> None:
    """Write an fp16 file in SDXL's single-file spelling; the metadata adds what tensors cannot declare."""
    parts = (denoiser.unet, denoiser.te1, denoiser.te2, vae)
    layout = denoiser.layout
    tensors = single_file_tensors(layout, *(part.state_dict() for part in parts))
    halves = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    provenance = Provenance(role=Role.MODEL, prediction="eps")
    license_entry = {"license": "MIT: trained on Fluent Emoji, Copyright (c) Microsoft Corporation"}
    write_tensors(
        path,
        halves,
        metadata={**provenance.to_metadata(), **hints_metadata(layout), **license_entry},
        force=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flat", type=Path, required=True, help="archive of the flat style")
    parser.add_argument("--three-d", type=Path, required=True, help="archive of the 3D style")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for checkpoints and the finished file"
    )
    parser.add_argument("--vae-steps", type=int, default=3900)
    parser.add_argument("--steps", type=int, default=7000, help="steps of the UNet and the text encoders")
    parser.add_argument("--width", type=int, default=1, help="factor of the UNet's channels and heads")
    args = parser.parse_args()
    torch.manual_seed(0)
    args.work.mkdir(parents=True, exist_ok=True)
    flat = read_pictures(args.flat)
    both = flat + read_pictures(args.three_d)
    vae = train_vae(both, args.work, args.vae_steps)
    vae = rescale_latents(vae, torch.stack([p.pixels for p in flat]))
    denoiser = train_denoiser(flat, vae, args.work, args.steps, layout_of(args.width))
    zero_unseen_tokens(denoiser, [picture.caption for picture in flat])
    write_base(denoiser, vae, args.work / "base.safetensors")


if __name__ == "__main__":
    main()
