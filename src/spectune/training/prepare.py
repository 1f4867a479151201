"""From a recipe's files to a model with trainable changes in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectune.adapters.adapter import Adapter
from spectune.adapters.reader import open_adapter
from spectune.adapters.writer import adapter_hash
from spectune.checkpoints.open import open_checkpoint
from spectune.core.frames import minor_frame, normalized, plain_frame, principal_frame
from spectune.core.low_rank import LowRank, product
from spectune.core.rank import FixedRank
from spectune.errors import InputError, PairingError
from spectune.files.provenance import Provenance, Role
from spectune.files.source import WeightSource, declared_prediction, declared_zero_snr
from spectune.files.weights_hash import WeightsHasher, weights_hash
from spectune.model.inject import Injection, inject
from spectune.model.network import Sdxl, build_model
from spectune.pairs.rules import BaseKind, check_frame, check_residual_pair, foreign_residual_hash, short_hash
from spectune.sdxl.layers import Catalogue, Layer, build_catalogue, layer_weight
from spectune.sdxl.selection import select_layers
from spectune.training.recipe.recipe import Recipe, parse_recipe
from spectune.training.recipe.sections.model import ModelSection
from spectune.training.seeds import derived_generator


@dataclass(frozen=True)
class Prepared:
    """A model that can be trained, and what its adapter files will say of where they come from."""

    model: Sdxl
    injection: Injection
    origin: Provenance  # base and principal hashes
    frame_hash: str


@dataclass(frozen=True)
class KnownFrames:
    """Frames that a run made of a base before."""

    base_hash: str | None
    layers: Mapping[str, LowRank]


def with_resolved_objective(recipe: Recipe) -> Recipe:
    """The recipe with the objective that its base declares where it names none.

    Raises InputError when the rest of the recipe does not fit that, and for bases that cannot be trained.
    """
    section = recipe.objective
    with open_checkpoint(recipe.model.checkpoint) as base:
        declared = declared_prediction(base) or "eps"
        kind = section.kind or declared
        if section.converts and (kind != "flow" or declared != "eps" or declared_zero_snr(base)):
            raise InputError(
                f"objective.start, teacher and bridge_steps turn an EPS base into a flow model: {base.label} "
                f"predicts {declared}, objective.kind is {kind}",
                hint='leave them out, or set kind = "flow" and name an EPS base',
            )
        shift, zero = section.flow_shift, section.zero_terminal_snr
        if kind == "flow" and shift is None:
            shift = base.provenance.flow_shift or 1.0
        if zero is None:
            zero = kind != "flow" and declared_zero_snr(base)
        resolved = {"kind": kind, "flow_shift": shift, "zero_terminal_snr": zero}
        data = recipe.model_dump() | {"objective": section.model_dump() | resolved}
        return parse_recipe(data, label=f"recipe, trained as {kind} for {base.label}")


def model_warnings(recipe: Recipe) -> list[str]:
    """What to know about a run that trains another tool's residual or teaches another prediction type."""
    found: list[str] = []
    if recipe.model.residual is not None:
        found.append(
            f"{recipe.model.checkpoint.name} is taken for what is left of a model without its principal: "
            "whether the two files belong together is not known"
        )
    if recipe.model.dropout_probability and recipe.model.form == "residual":
        found.append(
            "model.dropout_probability in the residual form leaves out parts of the model itself, "
            'not only of what is trained; form = "delta" does not'
        )
    with open_checkpoint(recipe.model.checkpoint) as base:
        declared = declared_prediction(base)
        if declared is None or recipe.objective.kind in (None, declared):
            return found
        return [
            *found,
            f"{base.label} declares that it predicts {declared}, objective.kind is {recipe.objective.kind}: "
            "this run converts the model",
        ]


def prepare(
    section: ModelSection,
    *,
    known: KnownFrames | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trained_dtype: torch.dtype = torch.float32,
    say: Callable[[str], None] = lambda text: None,
) -> Prepared:
    """Build the model and put the frames of the chosen parts in place.

    `known` stands in for splitting the base, if it was made of this one; `seed` is that of random frames.
    Frames that training data decide are plain ones until alignment.py has found them. `dtype` is that of the
    frozen model.
    Raises InputError for files that are of no use here, PairingError for files that do not belong together.
    """
    with open_checkpoint(section.checkpoint) as base:
        declared = base.provenance
        _check_role(section, declared)
        say(f"reading {section.checkpoint.name}")
        found = weights_hash(base)
        catalogue = build_catalogue(base, all_layers=True)
        frames: Mapping[str, LowRank]
        principal_hash = None
        if section.principal is None and known is not None and known.base_hash == found:
            frames = known.layers
        elif section.principal is None:
            verb = "splitting" if section.frame in ("principal", "minor") else "framing"
            say(f"{verb} {section.checkpoint.name} at rank {section.rank}")
            frames = _made_frames(base, catalogue, section, seed)
        else:
            adapter = _open_principal(section, catalogue)
            _check_pair(section, base, found, adapter)
            frames, principal_hash = adapter.layers, adapter_hash(adapter)
        chosen = {
            name: frames[name] for name in frames if catalogue.by_name[name].part.value in section.parts
        }
        if not chosen:
            owner = section.principal or f"model.layers = {', '.join(section.layers)}"
            raise InputError(
                f"no layer to train: {owner} has none in {', '.join(section.parts)}",
                hint="name other parts in model.parts",
            )
        model = build_model(base, device=device, dtype=dtype)
    is_residual = section.residual is not None or declared.role is Role.RESIDUAL
    if is_residual:
        add_frames(model, {name: frames[name] for name in frames if name not in chosen})
    if section.form == "residual":
        # what is trained starts as the rounded factors: the residual must be what they leave
        rounded = {name: _in_type(frame, trained_dtype) for name, frame in chosen.items()}
        if is_residual:
            exchange_frames(model, chosen, rounded)
        else:
            subtract_frames(model, rounded)
        chosen = rounded
    injection = inject(
        model, chosen, form=section.form, dtype=trained_dtype, dropout=section.dropout_probability
    )
    origin = Provenance(
        base_hash=_base_hash(section, declared, found, principal_hash),
        base_name=declared.base_name if declared.role is Role.RESIDUAL else section.checkpoint.name,
        principal_hash=principal_hash,
        frame=section.frame if section.principal is None else None,
        vae_scale=declared.vae_scale,
        vae_shift=declared.vae_shift,
        vae_padding=declared.vae_padding,
        vae_name=declared.vae_name,
    )
    return Prepared(model, injection, origin, hash_of_frames(chosen))


def _base_hash(
    section: ModelSection, declared: Provenance, found: str, principal_hash: str | None
) -> str | None:
    """The hash of the model that the change is for."""
    if declared.role is Role.RESIDUAL:
        return declared.base_hash
    if section.residual is None:
        return found
    # the original of another tool's residual is not known
    return foreign_residual_hash(found, principal_hash)


def _check_role(section: ModelSection, declared: Provenance) -> None:
    path = section.checkpoint
    if declared.role is not None and declared.role not in (Role.MODEL, Role.RESIDUAL):
        raise InputError(
            f"{path} is a {declared.role.value} file: expected a checkpoint",
            hint="model.base is the checkpoint, model.principal the adapter that `spectune split` made of it",
        )
    if section.residual is not None and declared.role is Role.MODEL:
        raise InputError(
            f"{path} is a whole model: model.residual is what is left of one without its principal",
            hint="name it as model.base",
        )
    if declared.role is Role.RESIDUAL and section.form == "delta":
        raise InputError(
            f"{path} is a residual: the delta form trains on the original weights",
            hint='give the original as model.base, or set model.form = "residual"',
        )
    if declared.role is Role.RESIDUAL and section.principal is None:
        raise InputError(
            f"{path} is a residual: its principal directions are in another file",
            hint="name that file as model.principal instead of giving model.rank",
        )


def _open_principal(section: ModelSection, catalogue: Catalogue) -> Adapter:
    assert section.principal is not None
    adapter = open_adapter(section.principal, catalogue)
    check_frame(adapter)
    assert isinstance(adapter, Adapter)
    return adapter


def _check_pair(section: ModelSection, base: WeightSource, found: str, adapter: Adapter) -> None:
    origin = adapter.provenance
    if BaseKind.of(base) is BaseKind.RESIDUAL:
        check_residual_pair(base, adapter)
    elif section.residual is None and origin.base_hash is not None and origin.base_hash != found:
        raise PairingError(
            f"{adapter.label} was split from base {short_hash(origin.base_hash)}, "
            f"{base.label} is {short_hash(found)}",
            hint="name the model that it was split from as model.base, or split this one",
        )


def _made_frames(
    base: WeightSource, catalogue: Catalogue, section: ModelSection, seed: int
) -> dict[str, LowRank]:
    """The frames of the chosen layers, made of the base itself."""
    chosen = [
        layer for layer in select_layers(catalogue, section.layers) if layer.part.value in section.parts
    ]
    return {layer.name: _made_frame(base, layer, section, seed) for layer in chosen}


def _made_frame(base: WeightSource, layer: Layer, section: ModelSection, seed: int) -> LowRank:
    assert section.rank is not None
    rank = FixedRank(section.rank, section.conv_rank).requested(layer.shape)
    if section.frame == "principal":
        frame = principal_frame(layer_weight(base, layer), rank=rank, name=layer.name)
    elif section.frame == "minor":
        frame = minor_frame(layer_weight(base, layer), rank=rank, name=layer.name)
    else:
        frame = plain_frame(layer.shape, rank=rank, generator=derived_generator(seed, "frame", layer.name))
    return frame if section.frame_norm is None else normalized(frame, section.frame_norm)


def add_frames(model: Sdxl, frames: Mapping[str, LowRank]) -> None:
    """Give layers of a residual that are not trained their principal part back, W = R + scale*B0 A0."""
    for name, frame in frames.items():
        _change_weight(model, name, product(frame))


def subtract_frames(model: Sdxl, frames: Mapping[str, LowRank]) -> None:
    """Turn weights into residuals W - scale*B0 A0, rounded once."""
    for name, frame in frames.items():
        _change_weight(model, name, -product(frame))


def exchange_frames(model: Sdxl, old: Mapping[str, LowRank], new: Mapping[str, LowRank]) -> None:
    """Turn residuals of some frames into those of others, R + scale*(B0 A0 - B A), rounded once."""
    for name, frame in new.items():
        pairs = ((frame.down, old[name].down), (frame.up, old[name].up))
        if not all(torch.equal(one.float(), other.float()) for one, other in pairs):
            _change_weight(model, name, product(old[name]) - product(frame))


@torch.no_grad()
def _change_weight(model: Sdxl, name: str, amount: Tensor) -> None:
    parent, attribute = model.place(name)
    weight: Tensor = getattr(parent, attribute).weight
    changed = weight.float() + amount.to(weight.device)
    # a new tensor: the old one may be mapped from the checkpoint
    getattr(parent, attribute).weight = nn.Parameter(changed.to(weight.dtype), requires_grad=False)


def _in_type(frame: LowRank, dtype: torch.dtype) -> LowRank:
    """A frame as trained tensors of this type can hold it."""
    if dtype == torch.float32:
        return frame
    return LowRank(frame.down.to(dtype), frame.up.to(dtype), frame.alpha)


def hash_of_frames(frames: Mapping[str, LowRank]) -> str:
    """The identity of frames on the CPU."""
    hasher = WeightsHasher()
    for name, frame in frames.items():
        hasher.add(f"{name}.down", frame.down)
        hasher.add(f"{name}.up", frame.up)
        hasher.add(f"{name}.alpha", torch.tensor(frame.alpha))
    return hasher.hexdigest()
