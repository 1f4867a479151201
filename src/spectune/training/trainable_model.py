"""Build a model with trainable changes from the files of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from spectune.adapters.detect import is_adapter
from spectune.checkpoints.open import open_checkpoint
from spectune.core.low_rank import LowRank, product
from spectune.errors import InputError
from spectune.files.provenance import Provenance, Role
from spectune.files.source import WeightSource, declared_prediction
from spectune.model.inject import Injection, inject
from spectune.model.network import Sdxl, build_model
from spectune.model.quantize import quantize_layers
from spectune.model.vae.convention import declare_vae, merge_conventions, own_convention
from spectune.model.vae.loading import choose_vae
from spectune.model.vae.vae_file import check_latents
from spectune.pairs.rules import check_whole_model, foreign_residual_hash
from spectune.sdxl.inference import infer_parts
from spectune.sdxl.layers import Catalogue
from spectune.sdxl.prediction_type import assumed_prediction, check_prediction
from spectune.training.base_file import Log, ReadBase, frames_of, read_base
from spectune.training.frames.making import hash_of_frames
from spectune.training.full.whole_tensors import WholeTensors, chosen_tensors, train_whole
from spectune.training.recipe.defaults import section_convention, start_provenance
from spectune.training.recipe.recipe import Recipe
from spectune.training.recipe.sections.model import ModelSection, VaeSection
from spectune.training.state import trained_tensors


@dataclass(frozen=True)
class TrainableModel:
    """A model with trainable changes, and the provenance for its adapter files."""

    sdxl: Sdxl
    injection: Injection
    provenance: Provenance  # base and principal hashes
    frame_hash: str
    whole: WholeTensors | None = None  # of a full fine-tuning, which has no injected layers

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by name, in the order of the optimizer."""
        if self.whole is not None:
            return dict(self.whole.parameters)
        return trained_tensors(self.injection.named_deltas())


def model_warnings(recipe: Recipe) -> list[str]:
    """Return warnings about the base, its form and a change of prediction type."""
    warnings: list[str] = []
    if recipe.model.residual is not None:
        warnings.append(
            f"{recipe.model.checkpoint.name} is used as a residual, but spectune cannot check whether it "
            "belongs to the principal"
        )
    if recipe.model.dropout_probability and recipe.model.form == "residual":
        warnings.append(
            "in the residual form, model.dropout_probability also drops directions of the base model; "
            'model.form = "delta" drops directions of the trained change only'
        )
    if recipe.model.refresh_every_steps is not None and recipe.model.frame == "principal":
        warnings.append(
            "model.refresh_every_steps hardly changes the principal frame, because the largest directions of "
            'the weights stay almost the same: model.frame = "plain" takes new directions'
        )
    with open_checkpoint(recipe.model.checkpoint) as base:
        check_prediction(base)
        check_channels(base, recipe.vae)
        start = start_provenance(recipe.model.start)
        assumed = assumed_prediction(base)
        if assumed is not None and start.prediction is None and recipe.objective.kind is None:
            warnings.append(f"{assumed}; set objective.kind if it is another one")
        declared, label = declared_prediction(base), base.label
        if start.prediction is not None and recipe.model.start is not None:
            declared, label = start.prediction, recipe.model.start.name
        if start.vae_name is not None and recipe.vae.path is None:
            warnings.append(
                f"{label} was trained with the VAE {start.vae_name}, but [vae] path is not set: the VAE of "
                f"{base.label} is used"
            )
        if declared is not None and recipe.objective.kind not in (None, declared):
            warnings.append(
                f"{label} predicts {declared}, but objective.kind is {recipe.objective.kind}: this run "
                "converts the model"
            )
    return warnings


def check_channels(base: WeightSource, section: VaeSection) -> None:
    """Raise InputError if the UNet takes other latents than the VAE makes, as an inpainting model does."""
    parts = infer_parts(base)
    expected = parts.unet.in_channels
    if expected == 9:  # 4 latents, 1 mask, 4 latents of the masked picture
        raise InputError(
            f"{base.label} is an inpainting model: the VAE makes latents of 4 channels, but the UNet takes 9",
            hint="spectune does not train inpainting models; commands on files, such as split, work",
        )
    if section.path is None and parts.vae is not None and parts.vae.latent_channels != expected:
        raise InputError(
            f"{base.label}: its VAE makes latents of {parts.vae.latent_channels} channels, "
            f"but the UNet takes {expected}",
            hint="set [vae] `path` to the VAE that this UNet was trained with",
        )
    if section.path is None and parts.vae is not None:
        default = merge_conventions(base.provenance, default=own_convention(parts.vae, expected))
        check_latents(parts.vae, section_convention(section, default), expected, base.label)


def check_trainable(source: WeightSource, *, hint: str = "pass the original model") -> None:
    """Raise InputError if a file is not a complete checkpoint that can be trained."""
    if is_adapter(source):
        raise InputError(
            f"{source.label} is an adapter: expected a checkpoint",
            hint="pass the model that the adapter belongs to",
        )
    check_whole_model(source, hint=hint)
    check_prediction(source)
    check_channels(source, VaeSection())


# ---------------------------------------------------------------- building the model


def build_trainable(
    section: ModelSection,
    *,
    base: ReadBase | None = None,
    frames: Mapping[str, LowRank] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    trained_dtype: torch.dtype = torch.float32,
    log: Log = lambda text: None,
) -> TrainableModel:
    """Build the model in main memory and add trainable changes to the layers of the parts to train.

    Args:
        section: The [model] section of a recipe.
        base: What `read_base` returned. None: it is read here.
        frames: The frames of `frames_of`. None: they are computed here.
        seed: The seed of plain frames. Runs with gradient or data frames start from plain frames too, until
            frames from the first batches replace them.
        dtype: The dtype of the frozen model.
        trained_dtype: The dtype of the trained tensors.
        log: Receives progress messages.

    Raises:
        InputError: A file is of the wrong kind.
        PairingError: The files do not belong together.
    """
    base = base or read_base(section, log=log)
    frames = frames_of(base, section, seed, log=log) if frames is None else frames
    chosen = {} if section.is_full else _choose(section, base.catalogue, frames)
    with open_checkpoint(section.checkpoint) as source:
        sdxl = build_model(source, dtype=dtype)
    if section.residual is not None or base.provenance.role is Role.RESIDUAL:
        # layers that are not trained get their principal added back
        _add_products(sdxl, {name: frames[name] for name in frames if name not in chosen})
        if section.form == "residual":
            chosen = _exchange_frames(sdxl, chosen, trained_dtype)
    elif section.form == "residual":
        chosen = _subtract_frames(sdxl, chosen, trained_dtype)
    dropout = section.dropout_probability
    injection = inject(sdxl, chosen, form=section.form, dtype=trained_dtype, dropout=dropout)
    provenance = _provenance(section, base)
    if base.start is not None:
        base.start.load_into(injection)
        provenance = base.start.recorded(provenance)
    whole = None
    if section.is_full:
        whole = train_whole(sdxl, chosen_tensors(section, sdxl.layout, base.catalogue))
    return TrainableModel(sdxl, injection, provenance, hash_of_frames(chosen), whole)


def _choose(section: ModelSection, catalogue: Catalogue, frames: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Return the frames of the parts to train."""
    names = [name for name in frames if catalogue.by_name[name].part.value in section.parts]
    if not names:
        owner = section.principal or section.start or f"model.layers = {', '.join(section.layers)}"
        raise InputError(
            f"no layer to train: {owner} has no layers in {', '.join(section.parts)}",
            hint="choose other parts in model.parts",
        )
    return {name: frames[name] for name in names}


def _provenance(section: ModelSection, base: ReadBase) -> Provenance:
    declared, base_hash, principal_hash = base.provenance, base.hash, base.principal_hash
    is_residual = declared.role is Role.RESIDUAL
    if is_residual:
        original_hash = declared.base_hash
    elif section.residual is None:
        original_hash = base_hash
    else:  # the original of another tool's residual is unknown
        original_hash = foreign_residual_hash(base_hash, principal_hash)
    return Provenance(
        base_hash=original_hash,
        base_name=declared.base_name if is_residual else section.checkpoint.name,
        principal_hash=principal_hash,
        frame=section.frame if section.frame_rank is not None else None,
        vae_scale=declared.vae_scale,
        vae_shift=declared.vae_shift,
        vae_padding=declared.vae_padding,
        vae_name=declared.vae_name,
    )


# ---------------------------------------------------------------- products of frames in the weights


def _add_products(sdxl: Sdxl, frames: Mapping[str, LowRank]) -> None:
    """Turn residuals into W = R + scale*B0 A0, rounded once."""
    for name, frame in frames.items():
        _change_weight(sdxl, name, product(frame))


def _subtract_frames(sdxl: Sdxl, frames: Mapping[str, LowRank], dtype: torch.dtype) -> dict[str, LowRank]:
    """Turn weights into residuals W - scale*B0 A0 and return the frames in `dtype`.

    The residual is computed from the rounded factors, because training starts from them. It is rounded once.
    """
    rounded = {name: _as_dtype(frame, dtype) for name, frame in frames.items()}
    for name, frame in rounded.items():
        _change_weight(sdxl, name, -product(frame))
    return rounded


def _exchange_frames(sdxl: Sdxl, frames: Mapping[str, LowRank], dtype: torch.dtype) -> dict[str, LowRank]:
    """Turn residuals of `frames` into residuals of the frames (A, B) in `dtype`; return the latter.

    The residuals R + scale*(B0 A0 - B A) are rounded once.
    """
    rounded = {name: _as_dtype(frame, dtype) for name, frame in frames.items()}
    for name, frame in rounded.items():
        pairs = ((frame.down, frames[name].down), (frame.up, frames[name].up))
        if not all(torch.equal(one.float(), other.float()) for one, other in pairs):
            _change_weight(sdxl, name, product(frames[name]) - product(frame))
    return rounded


@torch.no_grad()
def _change_weight(sdxl: Sdxl, name: str, amount: Tensor) -> None:
    parent, attribute = sdxl.place(name)
    weight: Tensor = getattr(parent, attribute).weight
    changed = weight.float() + amount.to(weight.device)
    # a new tensor: the old one may be memory-mapped from the checkpoint
    getattr(parent, attribute).weight = nn.Parameter(changed.to(weight.dtype), requires_grad=False)


def _as_dtype(frame: LowRank, dtype: torch.dtype) -> LowRank:
    if dtype == torch.float32:
        return frame
    return LowRank(frame.down.to(dtype), frame.up.to(dtype), frame.alpha)


# ---------------------------------------------------------------- quantization and autoencoder


def quantize(
    trainable: TrainableModel, kind: Literal["nf4", "int8"], device: torch.device, *, log: Log
) -> None:
    """Quantize the linear layers of the base in place, each on `device`, and log the error.

    The networks are in main memory afterwards.
    """
    frames = trainable.injection.frames()
    for part in quantize_layers(trainable.sdxl, kind, frames=frames, device=device):
        log(f"{kind} {part}")
    sdxl = trainable.sdxl
    networks: list[nn.Module] = [sdxl.unet, sdxl.te1, sdxl.te2]
    for network in networks:
        network.to("cpu")


def with_chosen_vae(trainable: TrainableModel, section: VaeSection) -> TrainableModel:
    """Return the model with the autoencoder of the recipe, also recorded in its provenance."""
    layout, provenance = trainable.sdxl.layout, trainable.provenance
    usual = own_convention(layout.vae, layout.unet.in_channels)
    convention = section_convention(section, merge_conventions(provenance, default=usual))
    if section.path is None and convention == usual:
        return trainable
    sdxl = choose_vae(trainable.sdxl, section.path, convention)
    chosen = sdxl.layout.vae
    if chosen is not None and chosen.packed is not None:
        if (section.scale, section.shift) != (None, None):
            raise InputError(
                "`vae.scale` and `vae.shift` do not apply: packed latents are normalized by "
                "the statistics in the file",
                hint="remove these keys",
            )
        # the values with which other programs leave packed latents as they are
        convention = replace(convention, scale=1.0, shift=0.0)
    return replace(trainable, sdxl=sdxl, provenance=declare_vae(provenance, convention, section.path))
