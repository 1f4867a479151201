"""Write a checkpoint with new first and last convolutions and another autoencoder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from spectune.checkpoints.diffusers_folder.config import UNET, VAE
from spectune.checkpoints.ema import EMA_ROOT, with_ema_as_unet
from spectune.checkpoints.open import open_checkpoint, open_writer
from spectune.core.rounding import rounded
from spectune.errors import InputError
from spectune.files.provenance import (
    ADAPTERS_KEY,
    LAYOUT_KEY,
    PREFIX,
    Role,
    modelspec_model,
    spectune_version,
)
from spectune.files.reader import Checkpoint
from spectune.files.source import RenamedFiles, RenamedTensor, TensorInfo, declared_prediction
from spectune.model.vae.convention import VaeConvention, declare_vae, resolve_convention
from spectune.model.vae.vae_file import check_latents, open_vae
from spectune.ops.latent_space.initial import first_convolution, last_convolution
from spectune.ops.latent_space.pictures import fit_to_pictures
from spectune.ops.latent_space.records import MovedLatents
from spectune.ops.options.adapter_files import ConvertOptions
from spectune.ops.shared import STALE, refuse_overwriting, template_of, write_all
from spectune.pairs.rules import check_whole_model
from spectune.sdxl.inference import infer_parts
from spectune.sdxl.layers import build_catalogue
from spectune.sdxl.layout import (
    NORM_GROUPS,
    UNET_ROOT,
    VAE_ROOT,
    PartLayouts,
    VaeLayout,
    read_hints,
)
from spectune.sdxl.names import vae_modules
from spectune.sdxl.state_dicts import joined, pieces_by_tensor, views_of

CONV_IN = f"{UNET_ROOT}input_blocks.0.0"
CONV_OUT = f"{UNET_ROOT}out.2"
INPAINTING_CHANNELS = 9


@dataclass(frozen=True)
class MoveReport:
    """The file that was written, and what is new in it and what was left out."""

    hash: str
    tensors: int
    latents: MovedLatents
    dropped: tuple[str, ...]


def move(options: ConvertOptions) -> MoveReport:
    """Write a checkpoint whose UNet takes latents of `latent_channels` channels. Progress counts tensors.

    Every other tensor of UNet and text encoders is copied byte for byte. The old autoencoder is left out if
    another one takes its place or if its latents do not fit the new UNet.

    Raises:
        InputError: The checkpoint is no complete model, or an inpainting model; or the autoencoder makes
            latents of another number of channels, or does not declare its scale.
    """
    assert options.latent_channels is not None
    with open_checkpoint(options.source) as source:
        refuse_overwriting(options.out, [source])
        check_whole_model(source)
        if options.ema:
            source = with_ema_as_unet(source)
        build_catalogue(source)  # raises InputError if the file is not SDXL
        parts = infer_parts(source)
        _check_unet(parts, source.label)
        convention = None
        if options.vae is not None:
            scale, shift = options.vae_scale, options.vae_shift
            convention = resolve_convention(options.vae, name=options.vae_name, scale=scale, shift=shift)
        vae, layout = _read_vae(options, convention)
        convolutions, latents = _new_convolutions(source, parts, options, convention)
        fits = parts.vae is not None and parts.vae.unet_channels == options.latent_channels
        keeps_vae = fits and layout is None
        roots = (EMA_ROOT,) if keeps_vae else (EMA_ROOT, VAE_ROOT)
        dropped = [name for name in source.tensors if name.startswith(roots)]
        latents = replace(latents, has_vae=keeps_vae or bool(vae))
        model = _with_tensors(source, {**convolutions, **vae}, dropped)
        stored = parts.vae if keeps_vae else layout if vae else None
        metadata = _metadata(source, options, convention if vae else None, stored)
        written = _write(model, metadata, options)
    return MoveReport(written, len(model.tensors), latents, tuple(dropped))


def _write(model: Checkpoint, metadata: Mapping[str, str], options: ConvertOptions) -> str:
    """Write the model and return its hash. A folder gets new configurations of UNet and autoencoder."""
    with open_writer(
        options.out,
        list(model.tensors.values()),
        metadata=metadata,
        force=options.force,
        template=template_of(model),
        renewed=(UNET, VAE),
    ) as writer:
        write_all(model, writer, options.progress)
    return writer.hash


def _check_unet(parts: PartLayouts, label: str) -> None:
    found, out = parts.unet.in_channels, parts.unet.out_channels
    if found != out:
        kind = "an inpainting model" if found == INPAINTING_CHANNELS else "not a text-to-image model"
        raise InputError(
            f"{label} is {kind}: its UNet takes {found} channels and predicts {out}",
            hint="`latent_channels` applies to models that take and predict the same latents",
        )


def _read_vae(
    options: ConvertOptions, convention: VaeConvention | None
) -> tuple[dict[str, Tensor], VaeLayout | None]:
    """Return the tensors that the new autoencoder has in a checkpoint, and its layout.

    A checkpoint can hold only an AutoencoderKL: there are no tensors for a packed or a deep one.

    Raises:
        InputError: It makes latents of another number of channels, does not fit the name of its convention,
            or has no declared scale.
    """
    assert options.latent_channels is not None
    if options.vae is None or convention is None:
        return {}, None
    with open_vae(options.vae) as file:
        layout = file.layout(convention, options.latent_channels)
        if layout.unet_channels != options.latent_channels:
            raise InputError(
                f"{options.vae.name} makes latents of {layout.unet_channels} channels, but `latent_channels` "
                f"is {options.latent_channels}",
                hint=f"set `latent_channels` to {layout.unet_channels}, or pass another autoencoder as `vae`",
            )
        check_latents(layout, convention, options.latent_channels, options.vae.name)
        if layout.packed is not None or layout.deep_config is not None:
            return {}, layout
        state = {key: tensor.clone() for key, tensor in file.state(layout).items()}
    pieces = pieces_by_tensor("vae", views_of(vae_modules(layout)))
    return {name: joined(rows, [state[row.key] for row in rows]) for name, rows in pieces.items()}, layout


def _new_convolutions(
    source: Checkpoint, parts: PartLayouts, options: ConvertOptions, convention: VaeConvention | None
) -> tuple[dict[str, Tensor], MovedLatents]:
    """Return both convolutions in the dtypes of the file."""
    assert options.latent_channels is not None
    init = options.init or ("zeros" if options.pictures is None else "fit")
    names = [f"{stem}.{kind}" for stem in (CONV_IN, CONV_OUT) for kind in ("weight", "bias")]
    old = {name: source.load(name) for name in names}
    repeat, channels = init != "zeros", options.latent_channels
    last = last_convolution(old[names[2]].float(), old[names[3]].float(), channels, repeat=repeat)
    first = first_convolution(old[names[0]].float(), channels, repeat=repeat)
    new = dict(zip(names, (first, old[names[1]].float(), *last), strict=True))
    record = MovedLatents(
        parts.unet.in_channels, channels, init, None if options.vae is None else options.vae.name
    )
    if init == "fit":
        assert convention is not None
        fitted, count = fit_to_pictures(source, new, options, convention)
        new = dict(zip(names, (*fitted.first, *fitted.last), strict=True))
        errors = {"first_error": fitted.first_error, "before_error": fitted.before_error}
        record = replace(record, pictures=count, error=fitted.last_error, **errors)
    return {name: rounded(tensor, old[name].dtype, name) for name, tensor in new.items()}, record


def _with_tensors(source: Checkpoint, replaced: Mapping[str, Tensor], dropped: Sequence[str]) -> Checkpoint:
    names = [name for name in source.tensors if name not in {*dropped, *replaced}]
    entries = {name: RenamedTensor(source.tensors[name], partial(source.load, name)) for name in names}
    for name, tensor in replaced.items():
        info = TensorInfo(name, tensor.dtype, tuple(tensor.shape))
        entries[name] = RenamedTensor(info, partial(replaced.__getitem__, name))
    files = [RenamedFiles(dict(sorted(entries.items())), [source])]
    return Checkpoint(source.path, files, source.metadata, label=source.label)


def _metadata(
    source: Checkpoint, options: ConvertOptions, convention: VaeConvention | None, vae: VaeLayout | None
) -> dict[str, str]:
    """Return the metadata of the moved model: its own scale and shift, and no record of adapters."""
    own = replace(
        source.provenance,
        role=Role.MODEL,
        version=spectune_version(),
        base_hash=None,
        base_name=None,
        principal_hash=None,
        prediction=declared_prediction(source),
    )
    if convention is not None:
        own = declare_vae(own, convention, None)
    elif vae is None:  # nothing is known about the one that the recipe names
        own = replace(own, vae_scale=None, vae_shift=None, vae_padding=None, vae_name=None)
    ours = {f"{PREFIX}{name}" for name in own.__dataclass_fields__} | {ADAPTERS_KEY, LAYOUT_KEY, *STALE}
    kept = {key: text for key, text in source.metadata.items() if key not in ours}
    hints = read_hints(source.metadata)
    hints.pop("vae_norm_groups", None)
    if vae is not None and vae.norm_groups != NORM_GROUPS:
        hints["vae_norm_groups"] = vae.norm_groups
    layout = {LAYOUT_KEY: json.dumps(hints)} if hints else {}
    title = options.out.name.removesuffix(".safetensors")
    return kept | modelspec_model(kept, title=title) | layout | own.to_metadata()
