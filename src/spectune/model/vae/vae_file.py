"""The file or folder of an autoencoder: the kind that it holds, its sizes, and its weights.

| kind | class of diffusers | recognized by |
| --- | --- | --- |
| of Stable Diffusion, FLUX.1 | AutoencoderKL | its key names |
| of FLUX.2 | AutoencoderKLFlux2 | `bn.running_mean`; apart from its statistics, it is an AutoencoderKL |
| deep compression, of Sana | AutoencoderDC | `config.json`, or its key names |

Key names are those of single files (sgm, also with the quant convolutions inside of encoder and decoder, as
in the files of FLUX.2) or of diffusers. This module loads no network library.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectune.checkpoints.diffusers_folder.config import config_number, read_config
from spectune.checkpoints.diffusers_folder.keys import STEMS, state_key
from spectune.checkpoints.diffusers_folder.subfolder import missing_weights
from spectune.checkpoints.plain_weights import with_plain_weights
from spectune.errors import InputError, counted, some_of
from spectune.files.reader import open_file
from spectune.files.source import TensorInfo, WeightSource
from spectune.model.vae.convention import CONFIG, VaeConvention, vae_folder
from spectune.model.vae.known import KNOWN_VAES, VaeKind
from spectune.sdxl.inference import ShapeProbe, vae_layout
from spectune.sdxl.layout import NORM_GROUPS, SDXL, VAE_ROOT, LatentStatistics, VaeLayout, read_hints
from spectune.sdxl.names import TensorView, vae_modules
from spectune.sdxl.state_dicts import views_of

_PREFIXES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# The name of the first convolution of the encoder, which identifies the spelling of the keys.
_SGM = "encoder.down.0.block.0.conv1.weight"
_DIFFUSERS = "encoder.down_blocks.0.resnets.0.conv1.weight"
_INNER_QUANT_CONVS = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}
_STATISTICS = "bn.running_mean", "bn.running_var"
_BATCH_NORM_EPS = 1e-4  # of FLUX.2
_DEEP = re.compile(r"encoder\.down_blocks\.\d+\.\d+\.")
_DEEP_ORIGINAL = "encoder.stages."  # of the original code of DC-AE
_MOST_LEVELS = 16

NOT_A_VAE = (
    "spectune reads AutoencoderKL (of Stable Diffusion and FLUX.1) and AutoencoderKLFlux2 with sgm or "
    "diffusers key names, and AutoencoderDC with those of diffusers"
)
# The configuration of Sana's AutoencoderDC, for files without one
SANA_CONFIG: Mapping[str, Any] = {
    "latent_channels": 32,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
}


@contextmanager
def open_vae(path: Path) -> Iterator[VaeFile]:
    """Open a safetensors file, a diffusers folder or a complete checkpoint with an autoencoder.

    Raises:
        InputError: The file is a pickle, lacks the encoder or decoder, or contains another autoencoder.
    """
    config = read_config(vae_folder(path) / CONFIG) if path.is_dir() else {}
    with open_file(_weights_file(path), label=path.name) as file:
        yield VaeFile(with_plain_weights(file), config, vae_folder(path) / CONFIG)


def _weights_file(path: Path) -> Path:
    """Return the safetensors file at `path`: `path` itself, or the file in its folder.

    The folder may be that of an autoencoder or of a pipeline.

    Raises:
        InputError: The folder has no weights, or several files of which none has the standard name.
    """
    if not path.is_dir():
        return path
    folder = vae_folder(path)
    found = sorted(folder.glob("*.safetensors"))
    standard = folder / f"{STEMS['vae']}.safetensors"
    if standard in found:
        return standard
    if not found:
        raise missing_weights(folder, "vae", hint="pass the folder of the VAE, or its file")
    if len(found) > 1:
        raise InputError(
            f"{folder} contains {len(found)} weight files: {some_of([file.name for file in found])}",
            hint="pass one of these files instead of the folder",
        )
    return found[0]


class VaeFile:
    """The autoencoder in a file, which may be a complete checkpoint.

    Args:
        source: The file.
        config: The config.json of its folder; empty without one.
        where: The path of the configuration, for messages.
    """

    def __init__(self, source: WeightSource, config: Mapping[str, Any], where: Path) -> None:
        self._source, self._config, self._where = source, config, where
        root = VAE_ROOT if any(name.startswith(VAE_ROOT) for name in source.tensors) else ""
        inside = {name.removeprefix(root): name for name in source.tensors if name.startswith(root)}
        self._stored = {_usual(name): stored for name, stored in inside.items()}  # usual name -> in the file
        self._names = frozenset(name for name in self._stored if name.startswith(_PREFIXES))
        self._check_halves()
        self.kind: VaeKind = self._kind()

    @property
    def label(self) -> str:
        """The name of the file or folder, for messages."""
        return self._source.label

    @property
    def is_sgm(self) -> bool:
        """Whether the keys have the names of single files."""
        return _SGM in self._names

    def layout(self, convention: VaeConvention, unet_channels: int | None = None) -> VaeLayout:
        """Return the sizes of the autoencoder, with the scale and shift of a convention.

        Args:
            convention: The scale and shift. Without `unet_channels`, its name decides whether z is packed.
            unet_channels: The channels of latents that the UNet takes. With four times those of z, the z of
                FLUX.2 is packed.

        Raises:
            InputError: The sizes do not fit each other, or the configuration has impossible values.
        """
        layout = self._deep_layout() if self.kind == "AutoencoderDC" else self._layout()
        layout = replace(layout, scale=convention.scale, shift=convention.shift)
        known = KNOWN_VAES.get(convention.name or "")
        if unet_channels is None and known is not None:
            unet_channels = known.channels
        is_packed = self.kind == "AutoencoderKLFlux2" and unet_channels == 4 * layout.latent_channels
        return replace(layout, packed=self._statistics(layout)) if is_packed else layout

    def state(self, layout: VaeLayout) -> dict[str, Tensor]:
        """Read the state dict of the module; raise InputError if tensors are missing or unknown."""
        if self.kind == "AutoencoderDC":
            return {name: self._load(name) for name in sorted(self._names)}
        views = views_of(vae_modules(layout))
        names = self._names_by_key(views)
        missing = sorted(key for key in views if names.get(key) not in self._names)
        unknown = sorted(self._names - {names[key] for key in views if key in names})
        if missing or unknown:
            raise self._unexpected(
                f"{counted(len(missing), 'tensor')} missing and {len(unknown)} unknown: "
                f"{some_of(missing + unknown)}"
            )
        return {key: view.read(self._load(names[key])) for key, view in views.items()}

    def _load(self, name: str) -> Tensor:
        return self._source.load(self._stored[name])

    @cached_property
    def _probe(self) -> ShapeProbe:
        tensors: dict[str, TensorInfo] = {
            name: self._source.tensors[stored] for name, stored in self._stored.items()
        }
        return ShapeProbe(tensors, self.label, kind="'s VAE", hint=NOT_A_VAE)

    def _kind(self) -> VaeKind:
        declared = self._config.get("_class_name", "AutoencoderKL")
        if declared not in ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderDC"):
            raise InputError(f"{self._where} is the configuration of {declared!r}", hint=NOT_A_VAE)
        if any(name.startswith(_DEEP_ORIGINAL) for name in self._names):
            raise InputError(
                f"{self.label} is an AutoencoderDC with the key names of its original code",
                hint="use the version for diffusers, for example of dc-ae-f32c32-sana-1.0-diffusers",
            )
        if declared == "AutoencoderDC" or any(map(_DEEP.match, self._names)):
            return "AutoencoderDC"
        if not self.is_sgm and _DIFFUSERS not in self._names:
            raise self._unexpected(f"neither {_SGM} nor {_DIFFUSERS}")
        return "AutoencoderKLFlux2" if _STATISTICS[0] in self._stored else "AutoencoderKL"

    # ------------------------------------------------------------ AutoencoderKL

    def _layout(self) -> VaeLayout:
        groups = self._norm_groups()
        layout = vae_layout(self._probe, sgm=self.is_sgm, norm_groups=groups)
        if any(width % groups for width in layout.channels):
            raise InputError(
                f"{self.label}: widths {layout.channels} are no multiples of the {groups} norm groups",
                hint=f"pass the diffusers folder of the VAE, whose {CONFIG} gives norm_num_groups",
            )
        return layout

    def _norm_groups(self) -> int:
        hint = read_hints(self._source.metadata).get("vae_norm_groups", NORM_GROUPS)
        found = self._config.get("norm_num_groups", hint)
        if type(found) is not int or found < 1:
            raise InputError(f"{self._where}: norm_num_groups is {found!r}, expected a positive integer")
        return found

    def _statistics(self, layout: VaeLayout) -> LatentStatistics:
        """Read the statistics of packed latents."""
        shape = (4 * layout.latent_channels,)
        for name in _STATISTICS:
            if (found := self._probe.shape(name, 1)) != shape:
                raise self._unexpected(f"{name} has shape {found}, expected {shape}")
        eps = config_number(self._config, "batch_norm_eps", self._where, default=_BATCH_NORM_EPS)
        means, variances = (self._load(name).float() for name in _STATISTICS)
        assert eps is not None
        deviations = torch.sqrt(variances + eps)
        found = LatentStatistics(tuple(means.tolist()), tuple(deviations.tolist()))
        if not all(map(math.isfinite, (*found.means, *found.deviations))) or min(found.deviations) <= 0:
            raise self._unexpected("its batch-norm statistics are not finite or have a variance of 0")
        return found

    def _names_by_key(self, views: Mapping[str, TensorView]) -> dict[str, str]:
        """Return the usual name for each state dict key."""
        if self.is_sgm:
            return {key: view.tensor.removeprefix(VAE_ROOT) for key, view in views.items()}
        return {state_key("vae", name): name for name in self._names}

    # ------------------------------------------------------------ AutoencoderDC

    def _deep_layout(self) -> VaeLayout:
        config = {key: value for key, value in self._config.items() if not key.startswith("_")}
        config = config or dict(SANA_CONFIG)
        widths = self._sizes(config, "encoder_block_out_channels", most=_MOST_LEVELS)
        for half in ("encoder", "decoder"):
            # a loop over layers that are not in the file would not end
            self._sizes(config, f"{half}_layers_per_block", most=_MOST_LEVELS, largest=len(self._names))
        return VaeLayout(
            channels=widths,
            resnets=0,
            latent_channels=self._probe.shape("decoder.conv_in.weight", 4)[1],
            norm_groups=1,
            scale=1.0,
            shift=0.0,
            quant_convs=False,
            deep_config=json.dumps(config, sort_keys=True),
        )

    def _sizes(
        self, config: Mapping[str, Any], key: str, *, most: int, largest: int = 1 << 16
    ) -> tuple[int, ...]:
        found = config.get(key, SANA_CONFIG[key])
        if (
            not isinstance(found, list)
            or not 0 < len(found) <= most
            or not all(type(size) is int and 0 <= size <= largest for size in found)
        ):
            raise InputError(
                f"{self._where}: {key} is {str(found)[:80]!r}: expected a list of at most {most} sizes"
            )
        return tuple(found)

    # ------------------------------------------------------------ errors

    def _check_halves(self) -> None:
        missing = [
            half
            for half in ("encoder", "decoder")
            if not any(name.startswith(f"{half}.") for name in self._names)
        ]
        if len(missing) == 2:
            found = some_of(sorted(self._source.tensors)) or "no tensors"
            raise InputError(f"{self.label} contains no VAE: found {found}", hint=NOT_A_VAE)
        if missing:
            raise InputError(f"{self.label} has no {missing[0]}", hint="use a file with the complete VAE")

    def _unexpected(self, what: str) -> InputError:
        return InputError(f"{self.label} is not laid out like SDXL's VAE: {what}", hint=NOT_A_VAE)


def check_latents(layout: VaeLayout, convention: VaeConvention, unet_channels: int, label: str) -> None:
    """Raise InputError if the latents of an autoencoder do not fit the UNet, or have no declared scale.

    The name of the convention must also fit.
    """
    found, name = layout.unet_channels, convention.name
    if found != unet_channels:
        raise InputError(
            f"{label} makes latents of {found} channels, but the UNet takes {unet_channels}",
            hint="use a VAE with the channels of the UNet, or give the UNet other channels with "
            f"`spectune convert MODEL --latent-channels {found} --vae FILE`",
        )
    if name is not None:
        known, is_deep = KNOWN_VAES[name], layout.deep_config is not None
        if known.channels != unet_channels or (known.kind == "AutoencoderDC") != is_deep:
            raise InputError(
                f"{label} is not the VAE {name!r}: that one is an {known.kind} with latents of "
                f"{known.channels} channels",
                hint="set the name of this VAE, or its scale and shift",
            )
    # SDXL's scale and shift are wrong for every other latent space
    if convention.is_assumed and unet_channels != SDXL.unet.in_channels and layout.packed is None:
        raise InputError(
            f"neither a name nor a file declares the scale and shift of {label}, whose latents have "
            f"{unet_channels} channels",
            hint="set the name of the VAE, or its scale and shift (docs/reference/vae.md lists known ones)",
        )


def _usual(name: str) -> str:
    """Return the name of a tensor with quant convolutions outside of encoder and decoder."""
    for inner, usual in _INNER_QUANT_CONVS.items():
        if name.startswith(inner):
            return usual + name.removeprefix(inner)
    return name
