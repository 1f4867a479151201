"""Load an autoencoder from its own file or folder and put it into a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from torch import Tensor, nn

from spectune.checkpoints.diffusers_folder.config import read_config
from spectune.checkpoints.diffusers_folder.keys import STEMS, state_key
from spectune.checkpoints.diffusers_folder.subfolder import missing_weights
from spectune.checkpoints.plain_weights import with_plain_weights
from spectune.errors import InputError, counted, some_of
from spectune.files.provenance import Padding
from spectune.files.reader import open_file
from spectune.files.source import WeightSource
from spectune.model.network import Sdxl, fill, new_vae, no_vae
from spectune.model.vae.convention import CONFIG, VaeConvention, vae_folder
from spectune.sdxl.inference import ShapeProbe, vae_layout
from spectune.sdxl.layout import NORM_GROUPS, VAE_ROOT, VaeLayout, read_hints
from spectune.sdxl.names import TensorView, vae_modules
from spectune.sdxl.state_dicts import views_of

_PREFIXES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# The name of the first convolution of the encoder, which identifies the spelling of the keys.
_SGM = "encoder.down.0.block.0.conv1.weight"
_DIFFUSERS = "encoder.down_blocks.0.resnets.0.conv1.weight"
_NOT_A_VAE = "spectune reads Stable Diffusion's AutoencoderKL, with sgm or diffusers key names"


@dataclass(frozen=True)
class LoadedVae:
    """An autoencoder in memory, frozen and in eval mode. `layout` holds scale and shift."""

    module: AutoencoderKL
    layout: VaeLayout
    padding: Padding
    label: str  # file or folder name, for messages


def load_vae(
    path: Path,
    convention: VaeConvention,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LoadedVae:
    """Load an autoencoder from a safetensors file, a diffusers folder or a complete checkpoint.

    The default dtype is float32 because SDXL's own VAE overflows in float16.

    Raises:
        InputError: The file is a pickle, lacks the encoder or decoder, or contains no AutoencoderKL.
    """
    with open_file(_weights_file(path), label=path.name) as file:
        source = with_plain_weights(file)
        weights = _VaeWeights(source)
        layout = weights.layout(convention, _norm_groups(path, source))
        state = {key: tensor.to(device, dtype) for key, tensor in weights.state(layout).items()}
    with init_empty_weights(include_buffers=False):
        module = new_vae(layout)
    fill(module, state, label=path.name, architecture="SDXL's VAE", hint=_NOT_A_VAE)
    pad_convolutions(module, convention.padding)
    return LoadedVae(module, layout, convention.padding, path.name)


def with_vae(model: Sdxl, vae: LoadedVae) -> Sdxl:
    """Return the model with another autoencoder; raise InputError if its latents do not fit the UNet."""
    expected, found = model.layout.unet.in_channels, vae.layout.latent_channels
    if found != expected:
        raise InputError(
            f"{vae.label} makes latents of {found} channels, but the UNet takes {expected}",
            hint="the VAE is for another family of models: use one made for SDXL",
        )
    return replace(model, vae=vae.module, layout=replace(model.layout, vae=vae.layout))


def with_convention(model: Sdxl, convention: VaeConvention) -> Sdxl:
    """Return the model with another convention of its own autoencoder. The weights are shared.

    Raises:
        InputError: The model has no autoencoder.
    """
    if model.vae is None or model.layout.vae is None:
        raise no_vae()
    # copy the modules, because the caller's must keep their padding, but not the weights
    shared = {id(tensor): tensor for tensor in model.vae.parameters()}
    module = copy.deepcopy(model.vae, shared)
    pad_convolutions(module, convention.padding)
    layout = replace(model.layout.vae, scale=convention.scale, shift=convention.shift)
    return with_vae(model, LoadedVae(module, layout, convention.padding, "the checkpoint's VAE"))


def choose_vae(model: Sdxl, path: Path | None, convention: VaeConvention) -> Sdxl:
    """Return the model with the autoencoder at `path`, or with its own one if `path` is None."""
    if path is None:
        return with_convention(model, convention)
    dtype = torch.float32 if model.vae is None else model.vae.dtype
    return with_vae(model, load_vae(path, convention, device=model.device, dtype=dtype))


def pad_convolutions(vae: nn.Module, padding: Padding) -> None:
    """Set the padding mode of every convolution that pads, in place.

    Downsamplers are not changed: they pad with zeros on one side, outside of their convolution.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module.padding, str) and any(module.padding):
            module.padding_mode = padding


def _weights_file(path: Path) -> Path:
    """Return the safetensors file at `path`: `path` itself, or the file in its folder.

    The folder may be that of an AutoencoderKL or of a pipeline.

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


class _VaeWeights:
    """The tensors of an autoencoder in a file, which may be a complete checkpoint."""

    def __init__(self, source: WeightSource) -> None:
        root = VAE_ROOT if any(name.startswith(VAE_ROOT) for name in source.tensors) else ""
        inside = (name.removeprefix(root) for name in source.tensors if name.startswith(root))
        self.source, self.root = source, root
        self.names = frozenset(name for name in inside if name.startswith(_PREFIXES))
        self._check_halves()
        self.is_sgm = _SGM in self.names
        if not self.is_sgm and _DIFFUSERS not in self.names:
            raise self._unexpected(f"neither {_SGM} nor {_DIFFUSERS}")

    def layout(self, convention: VaeConvention, norm_groups: int) -> VaeLayout:
        """Infer the layout from the shapes; raise InputError if a width is no multiple of `norm_groups`."""
        probe = ShapeProbe(
            self.source.tensors, self.source.label, root=self.root, kind="'s VAE", hint=_NOT_A_VAE
        )
        layout = vae_layout(
            probe,
            sgm=self.is_sgm,
            norm_groups=norm_groups,
            scale=convention.scale,
            shift=convention.shift,
        )
        if any(width % norm_groups for width in layout.channels):
            raise InputError(
                f"{self.source.label}: widths {layout.channels} are no multiples of the {norm_groups} norm "
                "groups",
                hint=f"pass the diffusers folder of the VAE, whose {CONFIG} gives norm_num_groups",
            )
        return layout

    def state(self, layout: VaeLayout) -> dict[str, Tensor]:
        """Read the state dict of the module; raise InputError if tensors are missing or unknown."""
        views = views_of(vae_modules(layout))
        names = self._names_by_key(views)
        missing = sorted(key for key in views if names.get(key) not in self.names)
        unknown = sorted(self.names - {names[key] for key in views if key in names})
        if missing or unknown:
            raise self._unexpected(
                f"{counted(len(missing), 'tensor')} missing and {len(unknown)} unknown: "
                f"{some_of(missing + unknown)}"
            )
        return {key: view.read(self.source.load(self.root + names[key])) for key, view in views.items()}

    def _names_by_key(self, views: Mapping[str, TensorView]) -> dict[str, str]:
        """Return the tensor name in the file for each state dict key."""
        if self.is_sgm:
            return {key: view.tensor.removeprefix(VAE_ROOT) for key, view in views.items()}
        return {state_key("vae", name): name for name in self.names}

    def _check_halves(self) -> None:
        missing = [
            half
            for half in ("encoder", "decoder")
            if not any(name.startswith(f"{half}.") for name in self.names)
        ]
        if len(missing) == 2:
            found = some_of(sorted(self.source.tensors)) or "no tensors"
            raise InputError(f"{self.source.label} contains no VAE: found {found}", hint=_NOT_A_VAE)
        if missing:
            raise InputError(
                f"{self.source.label} has no {missing[0]}", hint="use a file with the complete VAE"
            )

    def _unexpected(self, what: str) -> InputError:
        return InputError(f"{self.source.label} is not laid out like SDXL's VAE: {what}", hint=_NOT_A_VAE)


def _norm_groups(path: Path, source: WeightSource) -> int:
    config = read_config(vae_folder(path) / CONFIG) if path.is_dir() else {}
    found = config.get("norm_num_groups", read_hints(source.metadata).get("vae_norm_groups", NORM_GROUPS))
    if type(found) is not int or found < 1:
        raise InputError(f"{path / CONFIG}: norm_num_groups is {found!r}, expected a positive integer")
    return found
