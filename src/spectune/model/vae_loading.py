"""An autoencoder of its own beside a checkpoint: read from a file or folder, put into a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from torch import Tensor, nn

from spectune.checkpoints.diffusers_folder.config import read_config
from spectune.checkpoints.diffusers_folder.keys import state_key
from spectune.checkpoints.plain_weights import check_plain_weights
from spectune.errors import InputError, some_of
from spectune.files.provenance import Padding
from spectune.files.reader import open_file
from spectune.files.source import WeightSource
from spectune.model.network import Sdxl, new_vae
from spectune.model.vae_settings import CONFIG, VaeConvention, vae_folder, vae_weights
from spectune.sdxl.layout import NORM_GROUPS, VAE_ROOT, VaeLayout, read_hints
from spectune.sdxl.names import TensorView, vae_modules
from spectune.sdxl.state_dicts import views_of

_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# The first convolution of resnet {1} on level {0} of the encoder, by which the two spellings are told apart.
_SGM = "encoder.down.{}.block.{}.conv1.weight"
_DIFFUSERS = "encoder.down_blocks.{}.resnets.{}.conv1.weight"
_NOT_A_VAE = "spectune reads AutoencoderKL as Stable Diffusion has it, in sgm or diffusers spelling"


@dataclass(frozen=True)
class LoadedVae:
    """An autoencoder in memory, in eval mode and frozen; `layout` holds scale and shift."""

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
    """The autoencoder of a safetensors file, of a diffusers folder, or inside a whole checkpoint.

    float32 by default, because SDXL's own overflows in float16.
    Raises InputError for a pickle, a file without encoder, and one that is no AutoencoderKL.
    """
    with open_file(vae_weights(path), label=path.name) as source:
        check_plain_weights(source)
        named = _Named(source)
        layout = _layout(named, convention, _norm_groups(path, source))
        state = {key: tensor.to(device, dtype) for key, tensor in named.state(layout).items()}
    with init_empty_weights(include_buffers=False):
        module = new_vae(layout)
    _check_shapes(module, state, path.name)
    module.load_state_dict(state, strict=True, assign=True)
    pad_convolutions(module, convention.padding)
    module.requires_grad_(False).eval()
    return LoadedVae(module, layout, convention.padding, path.name)


def with_vae(model: Sdxl, vae: LoadedVae) -> Sdxl:
    """The model with another autoencoder; raises InputError where the UNet takes other latents."""
    wanted, found = model.layout.unet.in_channels, vae.layout.latent_channels
    if found != wanted:
        raise InputError(
            f"{vae.label} makes latents of {found} channels: the UNet takes {wanted}",
            hint="it belongs to another family of models; take one made for SDXL",
        )
    return replace(model, vae=vae.module, layout=replace(model.layout, vae=vae.layout))


def with_convention(model: Sdxl, convention: VaeConvention) -> Sdxl:
    """The model with its own autoencoder, whose weights it shares, scaled and padded by another convention.

    Raises InputError when it has none.
    """
    if model.vae is None or model.layout.vae is None:
        raise InputError("the checkpoint has no VAE", hint="name the file of one")
    # the modules are new, so that the caller's stays as it is; the weights are not copied
    shared = {id(tensor): tensor for tensor in model.vae.parameters()}
    module = copy.deepcopy(model.vae, shared)
    pad_convolutions(module, convention.padding)
    layout = replace(model.layout.vae, scale=convention.scale, shift=convention.shift)
    return with_vae(model, LoadedVae(module, layout, convention.padding, "the checkpoint's VAE"))


def choose_vae(model: Sdxl, path: Path | None, convention: VaeConvention) -> Sdxl:
    """The model with the autoencoder at `path`, or its own where that is None, by `convention`."""
    if path is None:
        return with_convention(model, convention)
    dtype = torch.float32 if model.vae is None else model.vae.dtype
    return with_vae(model, load_vae(path, convention, device=model.device, dtype=dtype))


def pad_convolutions(vae: nn.Module, padding: Padding) -> None:
    """Set how every convolution that pads does it, in place.

    The downsamplers pad one side by themselves, with zeros, and stay as they are.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module.padding, str) and any(module.padding):
            module.padding_mode = padding


class _Named:
    """The tensors of an autoencoder in a file, whatever stands around them."""

    def __init__(self, source: WeightSource) -> None:
        root = VAE_ROOT if any(name.startswith(VAE_ROOT) for name in source.tensors) else ""
        inside = (name.removeprefix(root) for name in source.tensors if name.startswith(root))
        self.source, self.root = source, root
        self.names = frozenset(name for name in inside if name.startswith(_PARTS))
        self._check_halves()
        self.is_sgm = _SGM.format(0, 0) in self.names
        if not self.is_sgm and _DIFFUSERS.format(0, 0) not in self.names:
            raise self._strange(f"no {_SGM.format(0, 0)}, no {_DIFFUSERS.format(0, 0)}")

    def shape(self, name: str, axes: int = 4) -> tuple[int, ...]:
        if name not in self.names:
            raise self._strange(f"no {name}")
        shape = self.source.tensors[self.root + name].shape
        if len(shape) != axes:
            raise self._strange(f"{name} has the shape {shape}, expected {axes} axes")
        return shape

    def state(self, layout: VaeLayout) -> dict[str, Tensor]:
        """The state dict of the module; raises InputError unless all tensors, and no others, are there."""
        views = views_of(vae_modules(layout))
        places = self._places(views)
        missing = sorted(key for key in views if places.get(key) not in self.names)
        spare = sorted(self.names - {places[key] for key in views if key in places})
        if missing or spare:
            raise self._strange(
                f"{len(missing)} tensors are missing and {len(spare)} have no place: "
                f"{some_of(missing + spare)}"
            )
        return {key: view.read(self.source.load(self.root + places[key])) for key, view in views.items()}

    def _places(self, views: Mapping[str, TensorView]) -> dict[str, str]:
        """Key of the state dict -> name in the file."""
        if self.is_sgm:
            return {key: view.tensor.removeprefix(VAE_ROOT) for key, view in views.items()}
        return {state_key("vae", name): name for name in self.names}

    def _check_halves(self) -> None:
        has = {
            half: any(name.startswith(f"{half}.") for name in self.names) for half in ("encoder", "decoder")
        }
        if has["encoder"] and has["decoder"]:
            return
        if not any(has.values()):
            found = some_of(sorted(self.source.tensors)) or "no tensors"
            raise InputError(f"{self.source.label} holds no VAE: found {found}", hint=_NOT_A_VAE)
        lost, left = ("encoder", "decoder") if has["decoder"] else ("decoder", "encoder")
        raise InputError(f"{self.source.label} has no {lost}, only a {left}", hint="take the whole VAE")

    def _strange(self, what: str) -> InputError:
        return InputError(f"{self.source.label} is not laid out like SDXL's VAE: {what}", hint=_NOT_A_VAE)


def _layout(named: _Named, convention: VaeConvention, norm_groups: int) -> VaeLayout:
    pattern = _SGM if named.is_sgm else _DIFFUSERS

    def run(of: str) -> int:
        return sum(1 for _ in takewhile(lambda n: of.format(n) in named.names, count()))

    levels = run(pattern.format("{}", 0))
    channels = tuple(named.shape(pattern.format(level, 0))[0] for level in range(levels))
    if any(width % norm_groups for width in channels):
        raise InputError(
            f"{named.source.label}: widths {channels} do not divide into {norm_groups} norm groups",
            hint=f"pass the diffusers folder, whose {CONFIG} gives norm_num_groups",
        )
    return VaeLayout(
        channels=channels,
        resnets=run(pattern.format(0, "{}")),
        latent_channels=named.shape("post_quant_conv.weight")[0],
        norm_groups=norm_groups,
        scale=convention.scale,
        shift=convention.shift,
    )


def _norm_groups(path: Path, source: WeightSource) -> int:
    config = read_config(vae_folder(path) / CONFIG) if path.is_dir() else {}
    found = config.get("norm_num_groups", read_hints(source.metadata).get("vae_norm_groups", NORM_GROUPS))
    if type(found) is not int or found < 1:
        raise InputError(f"{path / CONFIG}: norm_num_groups is {found!r}: expected a positive whole number")
    return found


def _check_shapes(module: nn.Module, state: Mapping[str, Tensor], label: str) -> None:
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    odd = sorted(key for key in wanted if wanted[key] != tuple(state[key].shape))
    if odd:
        first = odd[0]
        raise InputError(
            f"{len(odd)} tensors of {label} do not fit SDXL's VAE; first {first}: "
            f"expected {wanted[first]}, got {tuple(state[first].shape)}",
            hint=_NOT_A_VAE,
        )
