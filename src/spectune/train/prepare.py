"""From a recipe's files to a model with trainable changes in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from spectune.errors import InputError, PairingError
from spectune.factor.matrix import product
from spectune.factor.rank import FixedRank
from spectune.factor.split import split_weight
from spectune.model.inject import Injection, inject
from spectune.model.sdxl import Sdxl, build_model
from spectune.rebuild.pairing import adapter_hash, check_residual_pair, shown
from spectune.train.recipe import ModelSection, Recipe, parse_recipe
from spectune.weights.adapter import Adapter, LowRank, open_adapter
from spectune.weights.catalogue import Catalogue, build_catalogue, layer_weight
from spectune.weights.provenance import Provenance, Role, WeightsHasher, declared_prediction, weights_hash
from spectune.weights.reader import WeightSource, open_checkpoint


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
    with open_checkpoint(recipe.model.base) as base:
        if "ztsnr" in base.tensors:
            raise InputError(
                f"{base.label} has a zero-terminal-SNR schedule (key `ztsnr`): that is not supported yet",
                hint="train on a base with SDXL's own noise schedule",
            )
        kind = section.kind or declared_prediction(base) or "eps"
        shift = section.flow_shift
        if kind == "flow" and shift is None:
            shift = Provenance.from_metadata(base.metadata).flow_shift or 1.0
        data = recipe.model_dump() | {"objective": {"kind": kind, "flow_shift": shift}}
        return parse_recipe(data, label=f"recipe, trained as {kind} for {base.label}")


def conversion_warnings(recipe: Recipe) -> list[str]:
    """What to know about a run that teaches its base another prediction type."""
    with open_checkpoint(recipe.model.base) as base:
        declared = declared_prediction(base)
        if declared is None or recipe.objective.kind in (None, declared):
            return []
        return [
            f"{base.label} declares that it predicts {declared}, objective.kind is {recipe.objective.kind}: "
            "this run converts the model"
        ]


def prepare(
    section: ModelSection,
    *,
    known: KnownFrames | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    say: Callable[[str], None] = lambda text: None,
) -> Prepared:
    """Build the model and put the frames of the chosen parts in place.

    `known` stands in for splitting the base, if it was made of this one.
    Raises InputError for files that are of no use here, PairingError for files that do not belong together.
    """
    with open_checkpoint(section.base) as base:
        declared = Provenance.from_metadata(base.metadata)
        _check_role(section, declared)
        say(f"reading {section.base.name}")
        found = weights_hash(base)
        catalogue = build_catalogue(base, all_layers=True)
        frames: Mapping[str, LowRank]
        principal_hash = None
        if section.principal is None and known is not None and known.base_hash == found:
            frames = known.layers
        elif section.principal is None:
            say(f"splitting {section.base.name} at rank {section.rank}")
            frames = _split_frames(base, section)
        else:
            adapter = _open_principal(section, catalogue)
            _check_pair(base, found, adapter)
            frames, principal_hash = adapter.layers, adapter_hash(adapter)
        chosen = {
            name: frames[name] for name in frames if catalogue.by_name[name].part.value in section.parts
        }
        if not chosen:
            raise InputError(
                f"no layer to train: {section.principal} has none in {', '.join(section.parts)}",
                hint="name other parts in model.parts",
            )
        model = build_model(base, device=device, dtype=dtype)
    is_residual = declared.role is Role.RESIDUAL
    if is_residual:
        add_frames(model, {name: frames[name] for name in frames if name not in chosen})
    injection = inject(model, chosen, form=section.form)
    if section.form == "residual" and not is_residual:
        subtract_frames(injection, chosen)
    base_hash = declared.base_hash if is_residual else found
    origin = Provenance(
        base_hash=base_hash,
        base_name=declared.base_name if is_residual else section.base.name,
        principal_hash=principal_hash,
        vae_scale=declared.vae_scale,
        vae_shift=declared.vae_shift,
    )
    return Prepared(model, injection, origin, _hash_of(chosen))


def _check_role(section: ModelSection, declared: Provenance) -> None:
    if declared.role is not None and declared.role not in (Role.MODEL, Role.RESIDUAL):
        raise InputError(
            f"{section.base} is a {declared.role.value} file: expected a checkpoint",
            hint="model.base is the checkpoint, model.principal the adapter that `spectune split` made of it",
        )
    if declared.role is Role.RESIDUAL and section.form == "delta":
        raise InputError(
            f"{section.base} is a residual: the delta form trains on the original weights",
            hint='give the original as model.base, or set model.form = "residual"',
        )
    if declared.role is Role.RESIDUAL and section.principal is None:
        raise InputError(
            f"{section.base} is a residual: its principal directions are in another file",
            hint="name that file as model.principal instead of giving model.rank",
        )


def _open_principal(section: ModelSection, catalogue: Catalogue) -> Adapter:
    assert section.principal is not None
    adapter = open_adapter(section.principal, catalogue)
    if not isinstance(adapter, Adapter):
        raise InputError(
            f"{section.principal} is a tuned adapter: expected a principal one",
            hint="a run continues by itself from the states in run.output",
        )
    return adapter


def _check_pair(base: WeightSource, found: str, adapter: Adapter) -> None:
    origin = Provenance.from_metadata(adapter.metadata)
    if origin.principal_hash is not None:
        raise InputError(
            f"{adapter.label} is a principal that was trained already: its change would be lost",
            hint="rebuild the tuned model and split that, or let the run go on from its state in run.output",
        )
    if Provenance.from_metadata(base.metadata).role is Role.RESIDUAL:
        check_residual_pair(base, adapter)
    elif origin.base_hash is not None and origin.base_hash != found:
        raise PairingError(
            f"{adapter.label} was split from base {shown(origin.base_hash)}, {base.label} is {shown(found)}",
            hint="name the model that it was split from as model.base, or split this one",
        )


def _split_frames(base: WeightSource, section: ModelSection) -> dict[str, LowRank]:
    assert section.rank is not None
    rule = FixedRank(section.rank)
    return {
        layer.name: split_weight(
            layer_weight(base, layer),
            rank=rule.wanted(layer.shape),
            # float32: the frame is carried in the tuned file, and no principal file needs to be matched
            store=torch.float32,
            name=layer.name,
        ).low_rank
        for layer in build_catalogue(base)
        if layer.part.value in section.parts
    }


@torch.no_grad()
def subtract_frames(injection: Injection, frames: Mapping[str, LowRank]) -> None:
    """Turn the original weights under an injection into residuals W - scale*B0 A0, rounded once."""
    for name, layer in injection.layers.items():
        weight = layer.base.weight
        left = weight.float() - product(frames[name]).to(weight.device)
        # a new tensor: the old one may be mapped from the checkpoint
        layer.base.weight = nn.Parameter(left.to(weight.dtype), requires_grad=False)


@torch.no_grad()
def add_frames(model: Sdxl, frames: Mapping[str, LowRank]) -> None:
    """Give layers of a residual that are not trained their principal part back, W = R + scale*B0 A0."""
    for name, frame in frames.items():
        parent, attribute = model.place(name)
        weight = getattr(parent, attribute).weight
        whole = weight.float() + product(frame).to(weight.device)
        getattr(parent, attribute).weight = nn.Parameter(whole.to(weight.dtype), requires_grad=False)


def _hash_of(frames: Mapping[str, LowRank]) -> str:
    hasher = WeightsHasher()
    for name, frame in frames.items():
        hasher.add(f"{name}.down", frame.down)
        hasher.add(f"{name}.up", frame.up)
        hasher.add(f"{name}.alpha", torch.tensor(frame.alpha))
    return hasher.hexdigest()
