"""The sizes of an SDXL checkpoint, the prefixes of its tensors, and the metadata `spectune.layout`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from spectune.errors import InputError, did_you_mean, some_of
from spectune.files.provenance import LAYOUT_KEY, parse_json

PartName = Literal["unet", "te1", "te2", "vae"]
PARTS: tuple[PartName, ...] = get_args(PartName)

UNET_ROOT = "model.diffusion_model."
TE1_ROOT = "conditioner.embedders.0.transformer.text_model."
TE1_SHORT_ROOT = (
    "conditioner.embedders.0.transformer."  # in files that transformers 5 wrote; see `usual_names`
)
TE2_ROOT = "conditioner.embedders.1.model."
VAE_ROOT = "first_stage_model."
PART_ROOTS: Mapping[PartName, str] = {
    "unet": UNET_ROOT,
    "te1": TE1_SHORT_ROOT,
    "te2": TE2_ROOT,
    "vae": VAE_ROOT,
}

HEAD_CHANNELS = 64
MOST_HEADS = 65_536  # also of norm groups: no layer has more channels
NORM_GROUPS = 32
TIME_IDS = 6  # original height and width, crop top and left, target height and width
SDXL_VAE_SCALE = 0.13025
SDXL_VAE_SHIFT = 0.0

HINTS = ("unet_heads", "te1_heads", "te2_heads", "unet_norm_groups", "vae_norm_groups")
NOT_SDXL = "spectune reads SDXL checkpoints: single files (sgm keys) and folders of StableDiffusionXLPipeline"


@dataclass(frozen=True)
class UNetLayout:
    """The sizes of the UNet; tuples have one entry per level, from full resolution downwards."""

    channels: tuple[int, ...]  # SDXL: 320, 640, 1280
    depths: tuple[int, ...]  # transformer blocks after each resnet, 0 for none; SDXL: 0, 2, 10
    mid_depth: int
    resnets: int  # per level on the way down; one more on the way up
    in_channels: int
    out_channels: int
    context: int  # channels of the text conditioning
    heads: tuple[int, ...]
    time_id_channels: int  # sines and cosines per time id
    pooled: int  # channels of the pooled text conditioning
    norm_groups: int


@dataclass(frozen=True)
class TextLayout:
    """The sizes of a CLIP text encoder."""

    width: int
    layers: int
    heads: int
    mlp: int
    vocab: int
    context: int  # tokens
    projection: int | None  # channels of the pooled output; None without a projection
    activation: Literal["quick_gelu", "gelu"]


@dataclass(frozen=True)
class LatentStatistics:
    """The means and standard deviations of packed latents, by channel."""

    means: tuple[float, ...]
    deviations: tuple[float, ...]


@dataclass(frozen=True)
class VaeLayout:
    """The sizes of the VAE, and scale and shift of its latents: latents = (z - shift) * scale."""

    channels: tuple[int, ...]  # per level, from full resolution downwards
    resnets: int  # per level of the encoder, one more in the decoder
    latent_channels: int  # of z
    norm_groups: int
    scale: float
    shift: float
    quant_convs: bool = True  # whether it has quant_conv and post_quant_conv; Flux's VAE has none
    # 2 x 2 of z are one latent, normalized by these instead of scale and shift (FLUX.2)
    packed: LatentStatistics | None = None
    deep_config: str | None = None  # the config.json of an AutoencoderDC; None: an AutoencoderKL

    @property
    def pixels_per_z(self) -> int:
        """The edge length in pixels of one position of z."""
        return 2 ** (len(self.channels) - 1)

    @property
    def pixels_per_latent(self) -> int:
        """The edge length of a latent in pixels."""
        return self.pixels_per_z * (1 if self.packed is None else 2)

    @property
    def unet_channels(self) -> int:
        """The channels of latents."""
        return self.latent_channels * (1 if self.packed is None else 4)


@dataclass(frozen=True)
class PartLayouts:
    """The sizes of the parts of a checkpoint, which has at least a UNet; None for a part that it lacks."""

    unet: UNetLayout
    te1: TextLayout | None
    te2: TextLayout | None
    vae: VaeLayout | None

    @property
    def lacks(self) -> tuple[PartName, ...]:
        layouts = {"unet": self.unet, "te1": self.te1, "te2": self.te2, "vae": self.vae}
        return tuple(part for part in PARTS if layouts[part] is None)


@dataclass(frozen=True)
class Layout(PartLayouts):
    """The sizes of a checkpoint with a UNet and both text encoders; `vae` is None without a VAE."""

    te1: TextLayout
    te2: TextLayout

    @property
    def size_step(self) -> int:
        """The number of pixels that the sides of images are multiples of, with SDXL's VAE if it has none."""
        edge = 8 if self.vae is None else self.vae.pixels_per_latent
        return edge * 2 ** (len(self.unet.channels) - 1)


# The original SDXL. Adapters that are opened without a model get their layer names from it.
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


def default_heads(width: int) -> int:
    """Return SDXL's number of attention heads for `width` channels: one per 64 channels, at least one."""
    return max(width // HEAD_CHANNELS, 1)


def hints_metadata(layout: Layout) -> dict[str, str]:
    """Return the metadata entry `spectune.layout`: the sizes that no tensor shape determines."""
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
    """Return the entries of `spectune.layout`; raise InputError for an unknown key or an invalid value."""
    text = metadata.get(LAYOUT_KEY, "{}")
    hints = parse_json(text)
    if not isinstance(hints, dict):
        raise InputError(f"metadata {LAYOUT_KEY} is not a JSON object: {text[:80]}")
    for key, value in cast(dict[str, Any], hints).items():
        if key not in HINTS:
            raise InputError(
                f"metadata {LAYOUT_KEY} has an unknown key `{key}`{did_you_mean(key, HINTS)}",
                hint=f"expected one of {', '.join(HINTS)}",
            )
        check_hint(key, value, f"metadata {LAYOUT_KEY}")
    return cast(dict[str, Any], hints)


def check_hint(key: str, value: Any, where: str) -> None:
    """Raise InputError unless an entry of `spectune.layout` has a possible value."""
    per_level = key == "unet_heads"
    counts = cast(list[Any], value) if isinstance(value, list) else [value]
    if isinstance(value, list) != per_level or not all(
        type(n) is int and 0 < n <= MOST_HEADS for n in counts
    ):
        expected = "a list of positive integers" if per_level else "a positive integer"
        raise InputError(f"{where}: {key} is {value!r}: expected {expected}, at most {MOST_HEADS}")


def part_of(tensor: str) -> str:
    """Return the part of a single-file tensor: unet, te1, te2, vae or other."""
    return next((name for name, root in PART_ROOTS.items() if tensor.startswith(root)), "other")


def require(tensors: Mapping[str, Any], names: Sequence[str], label: str) -> None:
    """Raise InputError unless `tensors` has all `names`."""
    missing = [name for name in names if name not in tensors]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(names)} tensors are missing in {label}: {some_of(missing)}",
            hint=NOT_SDXL,
        )
