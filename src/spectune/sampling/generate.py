"""Sample latents for captions, with an SDXL in memory and the schedulers of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from PIL import Image
from torch import Tensor

from spectune.errors import InputError, did_you_mean
from spectune.model.network import DRAWING_BATCH, Sdxl, TextStates
from spectune.model.prediction import Ddpm, Flow, Prediction
from spectune.sampling.terminal_ddim import TerminalDdim
from spectune.sdxl.vocabulary import MAX_TOKENS

# SDXL's published scheduler configuration.
_DDPM: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
_DDPM_SAMPLERS: Mapping[str, Callable[[Any], Any]] = {
    "euler": lambda kind: EulerDiscreteScheduler(prediction_type=kind, **_DDPM),
    "euler_a": lambda kind: EulerAncestralDiscreteScheduler(prediction_type=kind, **_DDPM),
    "ddim": lambda kind: DDIMScheduler(
        prediction_type=kind, clip_sample=False, set_alpha_to_one=False, **_DDPM
    ),
    "dpmpp_2m": lambda kind: DPMSolverMultistepScheduler(prediction_type=kind, **_DDPM),
}
# For zero terminal SNR, Euler's method is computed as DDIM.
_TERMINAL_SAMPLERS: Mapping[str, Callable[[Ddpm], Any]] = {"euler": TerminalDdim, "ddim": TerminalDdim}
_FLOW_SAMPLERS: Mapping[str, Callable[[float], Any]] = {
    "euler": lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift),
    "heun": lambda shift: FlowMatchHeunDiscreteScheduler(shift=shift),
}

ALL_SAMPLERS = tuple(dict.fromkeys([*_DDPM_SAMPLERS, *_FLOW_SAMPLERS]))
# The same sampler under another name.
_ALIASES = {"dpmsolver++": "dpmpp_2m", "dpm++_2m": "dpmpp_2m"}
# Samplers of sd-scripts that are not offered, and the offered one that is most like them.
_CLOSEST = {
    "pndm": "ddim",
    "lms": "euler",
    "heun": "euler",
    "dpm_2": "euler",
    "dpm_2_a": "euler_a",
    "dpmsolver": "dpmpp_2m",
    "dpmsingle": "dpmpp_2m",
}


@dataclass(frozen=True)
class SampleSettings:
    """The settings of the sampler. Sizes are in pixels."""

    width: int = 1024
    height: int = 1024
    steps: int = 25
    cfg: float = 5.0
    sampler: str = "euler"
    negative: str = ""
    batch: int = DRAWING_BATCH
    max_tokens: int = MAX_TOKENS  # of a caption; the tokens beyond are cut


@dataclass(frozen=True)
class Request:
    """The caption of a picture and the seed of its noise."""

    caption: str
    seed: int


@torch.no_grad()
def sample_latents(
    model: Sdxl, requests: Sequence[Request], settings: SampleSettings, text: TextStates | None = None
) -> Tensor:
    """Sample the latents of a batch of requests, (batch, 4, h, w) float32.

    `text` are the encoded `guided_captions`, on any device. None: they are encoded here.
    """
    flow = isinstance(model.prediction, Flow)
    scheduler = make_scheduler(model.prediction, settings.sampler, pixels=settings.width * settings.height)
    scheduler.set_timesteps(settings.steps, device=model.device)
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    latents = _noise(model, generators, settings) * getattr(scheduler, "init_noise_sigma", 1.0)
    if text is None:
        text = model.encode_captions(guided_captions(requests, settings), max_tokens=settings.max_tokens)
    text = text.to(model.device)
    time_ids = torch.tensor([[settings.height, settings.width, 0, 0, settings.height, settings.width]])
    time_ids = time_ids.to(model.device, torch.float32).expand(len(text.pooled), -1)
    extra = {"generator": generators} if settings.sampler == "euler_a" else {}
    for timestep in scheduler.timesteps:
        noised = latents if flow else scheduler.scale_model_input(latents, timestep)
        noised = torch.cat([noised, noised]) if settings.cfg != 1.0 else noised
        times = timestep.expand(len(noised))
        output = model.denoise(noised.to(model.unet.dtype), times, text, time_ids).float()
        latents = scheduler.step(_guided(output, settings.cfg), timestep, latents, **extra).prev_sample
    return latents


def make_scheduler(prediction: Prediction, sampler: str, *, pixels: int | None = None) -> Any:
    """Return a scheduler for `prediction`, from diffusers or with the same interface.

    `pixels` is the image area. Only flow with a shift by resolution needs it.

    Raises:
        InputError: The sampler is not available for the prediction type.
    """
    terminal = _terminal(prediction)
    samplers = samplers_of(prediction)
    if sampler not in samplers:
        kind = f"zero-terminal-SNR {prediction.name}" if terminal else prediction.name
        raise InputError(
            f"no sampler {sampler!r} for {kind} models{did_you_mean(sampler, samplers)}",
            hint=f"choose one of {', '.join(samplers)}",
        )
    if terminal:
        return _TERMINAL_SAMPLERS[sampler](terminal)
    if isinstance(prediction, Flow):
        return _FLOW_SAMPLERS[sampler](prediction.shift_at(pixels))
    return _DDPM_SAMPLERS[sampler]({"eps": "epsilon", "v": "v_prediction"}[prediction.name])


def samplers_of(prediction: Prediction) -> tuple[str, ...]:
    """Return the names of the samplers for a prediction type."""
    if _terminal(prediction):
        return tuple(_TERMINAL_SAMPLERS)
    return tuple(_FLOW_SAMPLERS if isinstance(prediction, Flow) else _DDPM_SAMPLERS)


def check_sampler_name(name: str) -> str:
    """Return `name`; raise InputError if neither spectune nor sd-scripts has a sampler of this name."""
    _plain_name(name)
    return name


def find_sampler(name: str, prediction: Prediction) -> tuple[str, str | None]:
    """Return the sampler for a model, and a note if it is another one than `name` says.

    Raises:
        InputError: The name is unknown.
    """
    plain, offered = _plain_name(name), samplers_of(prediction)
    if plain in offered:
        return plain, None
    closest = _CLOSEST.get(plain, "euler")
    sampler = closest if closest in offered else "euler"
    return sampler, f"{name} is not offered for this {prediction.name} model: {sampler} is used instead"


def _plain_name(name: str) -> str:
    plain = name.strip().lower().replace(" ", "_").removeprefix("k_")
    plain = _ALIASES.get(plain, plain)
    if plain not in ALL_SAMPLERS and plain not in _CLOSEST:
        raise InputError(
            f"unknown sampler {name!r}{did_you_mean(plain, (*ALL_SAMPLERS, *_CLOSEST))}",
            hint=f"the samplers are {', '.join(ALL_SAMPLERS)}",
        )
    return plain


def _terminal(prediction: Prediction) -> Ddpm | None:
    """Return `prediction` if its schedule has zero terminal SNR."""
    return prediction if isinstance(prediction, Ddpm) and prediction.zero_terminal_snr else None


def guided_captions(requests: Sequence[Request], settings: SampleSettings) -> list[str]:
    """Return the negative prompts and then the captions, or only the captions without guidance (cfg 1)."""
    captions = [request.caption for request in requests]
    return captions if settings.cfg == 1.0 else [settings.negative] * len(captions) + captions


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Convert pixels (batch, 3, H, W) in -1..1 to 8-bit pictures."""
    levels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()) for picture in levels]


def _noise(model: Sdxl, generators: Sequence[torch.Generator], settings: SampleSettings) -> Tensor:
    edge = model.pixels_per_latent
    shape = (model.layout.unet.in_channels, settings.height // edge, settings.width // edge)
    # on the CPU, so that a seed gives the same picture on every device
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(model.device)


def _guided(output: Tensor, cfg: float) -> Tensor:
    if cfg == 1.0:
        return output
    negative, positive = output.chunk(2)
    return negative + cfg * (positive - negative)


def check_size(model: Sdxl, settings: SampleSettings) -> None:
    """Raise InputError if the UNet does not support the size of the pictures."""
    step = model.size_step
    for name, value in (("width", settings.width), ("height", settings.height)):
        if value <= 0 or value % step:
            raise InputError(f"{name} {value} is not a positive multiple of {step} pixels")
