"""Weighted sums of checkpoints: each tensor is computed when it is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectune.core.linalg import empty, largest_magnitude, pieces
from spectune.core.rounding import WEIGHT_DTYPES, check_finite, rounded
from spectune.errors import InputError, counted, did_you_mean, some_of
from spectune.files.provenance import (
    LAYOUT_KEY,
    HasProvenance,
    Provenance,
    Role,
    modelspec_metadata,
    spectune_version,
)
from spectune.files.source import TensorInfo, WeightSource, declared_prediction, declared_zero_snr
from spectune.pairs.merged import add, cast_weights
from spectune.pairs.strength import ModelWeights
from spectune.sdxl.inference import part_layouts
from spectune.sdxl.layers import squeezed
from spectune.sdxl.layout import PARTS, SDXL_VAE_SCALE, PartLayouts, PartName
from spectune.sdxl.names import modules_of

Summand = tuple[int, ModelWeights | None]  # index of the checkpoint; None: what the others lack to a sum of 1
Terms = tuple[tuple[int, float], ...]  # index of the checkpoint and its weight, without weights of 0


@dataclass(frozen=True)
class WeightedSum(HasProvenance):
    """A source of the tensors sum of weight * tensor, each computed in float32 and rounded once.

    A tensor whose only weight is 1 is a copy, cast if the sum has another dtype.
    """

    sources: Sequence[WeightSource]
    terms: Mapping[str, Terms]
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    label: str
    warnings: tuple[str, ...] = ()

    def over(self, sources: Sequence[WeightSource]) -> WeightedSum:
        """Return the same sum, but read the checkpoints through other sources."""
        return replace(self, sources=sources)

    @property
    def summed(self) -> int:
        """Return the number of tensors that are not copies."""
        return sum(not _is_copy(terms) for terms in self.terms.values())

    @property
    def cast(self) -> int:
        """Return the number of copies in another dtype than in their checkpoint."""
        copies = {name: terms[0][0] for name, terms in self.terms.items() if _is_copy(terms)}
        return sum(
            self.tensors[name].dtype != self.sources[index].tensors[name].dtype
            for name, index in copies.items()
        )

    def load(self, name: str) -> Tensor:
        """Return a tensor of the sum. Raises InputError if it is not finite or overflows its dtype."""
        terms, dtype = self.terms[name], self.tensors[name].dtype
        (first, _), *others = terms
        stored = self.sources[first].load(name)
        if _is_copy(terms):
            return stored if dtype == stored.dtype else self._rounded(stored.float(), dtype, name)
        # S x0 + sum of w (x - x0): with S = 1, equal values keep their bits at all weights
        result, total = empty(tuple(stored.shape), torch.float32).zero_(), _total(terms)
        for index, weight in others:
            tensor = self.sources[index].load(name)
            for amount, x, x0 in zip(pieces(result), pieces(tensor), pieces(stored), strict=True):
                amount.add_(x.float() - x0.float(), alpha=weight)
        for amount, x0 in zip(pieces(result), pieces(stored), strict=True):
            amount.copy_(add(x0.float() * total, amount))
        if not largest_magnitude(result) < math.inf:
            self._explain(result, name)
        return self._rounded(result, dtype, name)

    def _rounded(self, exact: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        hint = "use smaller weights, or set `dtype` to bfloat16 or float32"
        return rounded(exact, dtype, f"{name} of the sum", hint=hint)

    def _explain(self, result: Tensor, name: str) -> None:
        """Raise InputError for a tensor with NaN or infinity; name the checkpoint that has them."""
        for index, _ in self.terms[name]:
            source = self.sources[index]
            hint = "the file is damaged: download it again, or leave it out"
            check_finite(source.load(name), f"{name} of {source.label}", hint=hint)
        check_finite(result, f"{name} of the sum", hint="use smaller weights")


def weighted_sum(
    sources: Sequence[WeightSource], summands: Sequence[Summand], *, dtype: torch.dtype | None = None
) -> WeightedSum:
    """Return the lazy sum of checkpoints.

    Weights apply to the modules of SDXL. Other tensors, such as position ids and markers, are those of the
    first checkpoint with a weight for the UNet. A part that a checkpoint lacks is copied from the first one
    that has it, with a warning. A sum has the dtype of its first tensor; with `dtype`, all tensors of the
    UNet and the text encoders have that.

    Raises InputError if tensors are missing or differ in shape, or if a part has no weights.
    """
    layouts = [part_layouts(source.tensors, label=source.label) for source in sources]
    modules = _modules(layouts)
    _check_words(summands, modules)
    terms = {name: _terms(name, module, summands) for name, module in modules.items()}
    lacking = _copy_lacking(terms, modules, sources, layouts)
    _check(terms, modules, sources)
    lead = next(iter(terms.values()))[0][0]
    of_vae = next((terms[name][0][0] for name in terms if modules[name].part == "vae"), lead)
    sums = _sums(terms, modules)
    disagreements = _disagreements(terms, modules, sources)
    terms |= {name: ((lead, 1.0),) for name in sources[lead].tensors if name not in terms}
    infos = {name: sources[index].tensors[name] for name, ((index, _), *_) in terms.items()}
    return WeightedSum(
        sources=sources,
        terms=terms,
        metadata=_metadata(sources[lead], sources[of_vae], is_model=0 not in sums["unet"]),
        tensors=infos if dtype is None else cast_weights(infos, dtype),
        label=" + ".join(source.label for source in sources),
        warnings=(*lacking, *_sum_warnings(sums), *disagreements, *_left_out(terms, sources)),
    )


@dataclass(frozen=True)
class _Module:
    """The part of a tensor, and the names by which weights select it; q, k and v may share a tensor."""

    part: PartName
    names: tuple[tuple[str, ...], ...]


def _modules(layouts: Sequence[PartLayouts]) -> dict[str, _Module]:
    """Return the tensors of all modules, those of the UNet first."""
    result: dict[str, _Module] = {}
    for part in PARTS:
        layout = next((layout for layout in layouts if part not in layout.lacks), None)
        for module in () if layout is None else modules_of(layout, part):
            both = "te" if part.startswith("te") else part
            names = (both, part, module.block, f"{part}.{module.block}", module.layer)
            for _, view in module.parameters:
                earlier = result.get(view.tensor)
                result[view.tensor] = _Module(part, (*(earlier.names if earlier else ()), names))
    return result


def _check_words(summands: Sequence[Summand], modules: Mapping[str, _Module]) -> None:
    known = dict.fromkeys(names for module in modules.values() for names in module.names)
    words = {word for _, weights in summands if weights is not None for word in weights.by_word}
    for word in sorted(words):
        if not any(ModelWeights(by_word={word: 1.0}).of(names) for names in known):
            close = did_you_mean(word, dict.fromkeys(name for names in known for name in names))
            raise InputError(
                f"no tensor matches `{word}` in the weights{close}",
                hint="use a part (unet, te, te1, te2, vae), a block (down.1, mid, te1.3) or a pattern such "
                "as unet.*attn2*",
            )


def _terms(name: str, module: _Module, summands: Sequence[Summand]) -> Terms:
    """Return the checkpoints with a weight for a tensor."""
    values: dict[int, float] = {}
    rest = next((index for index, weights in summands if weights is None), None)
    for index, weights in summands:
        if weights is None:
            continue
        found = {weights.of(names) for names in module.names}
        if len(found) > 1:
            raise InputError(
                f"{name} contains {counted(len(module.names), 'layer')} with different weights: "
                f"{', '.join(names[-1] for names in module.names)}",
                hint="give q, k and v of text encoder 2 the same weight",
            )
        values[index] = values.get(index, 0.0) + found.pop()
    if rest is not None:
        values[rest] = values.get(rest, 0.0) + 1 - sum(values.values())
    exact = {index: _snapped(values[index]) for index, _ in summands}
    return tuple((index, value) for index, value in exact.items() if value)


def _snapped(value: float) -> float:
    """Return a whole number for a value that is one except for rounding, such as 1 - 0.9 - 0.1."""
    return float(round(value)) if math.isclose(value, round(value), abs_tol=1e-9) else value


def _total(terms: Terms) -> float:
    return _snapped(math.fsum(weight for _, weight in terms))


def _is_copy(terms: Terms) -> bool:
    return len(terms) == 1 and terms[0][1] == 1


def _copy_lacking(
    terms: dict[str, Terms],
    modules: Mapping[str, _Module],
    sources: Sequence[WeightSource],
    layouts: Sequence[PartLayouts],
) -> list[str]:
    """Copy each part that a checkpoint with a weight for it lacks; return a warning for each."""
    warnings: list[str] = []
    for part in PARTS:
        names = [name for name, module in modules.items() if module.part == part]
        weighted = list(dict.fromkeys(index for name in names for index, _ in terms[name]))
        lacking = [sources[index].label for index in weighted if part in layouts[index].lacks]
        if not lacking:
            continue
        holders = [index for index, layout in enumerate(layouts) if part not in layout.lacks]
        holder = next((index for index in weighted if index in holders), holders[0])
        terms |= dict.fromkeys(names, ((holder, 1.0),))
        warnings.append(
            f"{some_of(lacking)} {'has' if len(lacking) == 1 else 'have'} no {part}: it is copied from "
            f"{sources[holder].label}"
        )
    return warnings


def _check(
    terms: Mapping[str, Terms], modules: Mapping[str, _Module], sources: Sequence[WeightSource]
) -> None:
    """Raise InputError that names all tensors without a weight, and all that cannot be summed."""
    problems: dict[str, list[str]] = {}  # problem -> names of tensors
    for name, used in terms.items():
        if not used:
            problems.setdefault(f"no checkpoint has a weight for {modules[name].part}", []).append(name)
        first = None
        for index, _ in used:
            label, info = sources[index].label, sources[index].tensors.get(name)
            if info is None:
                problems.setdefault(f"{label} lacks", []).append(name)
            elif info.dtype not in WEIGHT_DTYPES:
                problems.setdefault(f"{label} has no float weights up to 32 bits in", []).append(name)
            elif first is not None and squeezed(info.shape) != squeezed(first.shape):
                shapes = f"{name} {info.shape}, not {first.shape}"
                problems.setdefault(f"{label} has other shapes than {sources[used[0][0]].label}", []).append(
                    shapes
                )
            else:
                first = first or info
    if problems:
        raise InputError(
            "; ".join(
                f"{problem}: {counted(len(names), 'tensor')}, {some_of(names)}"
                for problem, names in problems.items()
            ),
            hint="give every part a weight; leave a part of a file out with the weight 0, as in "
            "FILE:0.5,vae=0; models of other sizes cannot be summed",
        )


def _sums(terms: Mapping[str, Terms], modules: Mapping[str, _Module]) -> dict[str, dict[float, int]]:
    """Return the sums of weights in each part, with the number of their tensors."""
    sums: dict[str, dict[float, int]] = {}
    for name, used in terms.items():
        by_sum = sums.setdefault(modules[name].part, {})
        by_sum[_total(used)] = by_sum.get(_total(used), 0) + 1
    return sums


def _sum_warnings(sums: Mapping[str, Mapping[float, int]]) -> list[str]:
    # a sum of 0 is a difference of models
    other = [
        f"{total:g} for {counted(count, 'tensor')} of {part}"
        for part, by_sum in sums.items()
        for total, count in by_sum.items()
        if total not in (0, 1)
    ]
    return [f"the weights do not sum to 1: {', '.join(other)}"] if other else []


def _disagreements(
    terms: Mapping[str, Terms], modules: Mapping[str, _Module], sources: Sequence[WeightSource]
) -> list[str]:
    """Return a warning for each setting in which the checkpoints of a part differ."""
    warnings: list[str] = []
    for part, setting, read in _SETTINGS:
        used = dict.fromkeys(i for name, t in terms.items() if modules[name].part == part for i, _ in t)
        values = {sources[index].label: read(sources[index]) for index in used}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{value} ({label})" for label, value in values.items())
            warnings.append(
                f"the checkpoints have different {setting}: {listed}; the result declares the first one: "
                "check samples"
            )
    return warnings


def _latents(source: WeightSource) -> str:
    declared = source.provenance
    scale = SDXL_VAE_SCALE if declared.vae_scale is None else declared.vae_scale
    return f"scale {scale:g}, shift {declared.vae_shift or 0:g}, padding {declared.vae_padding or 'zeros'}"


_SETTINGS: tuple[tuple[PartName, str, Callable[[WeightSource], str]], ...] = (
    ("unet", "prediction types", lambda source: declared_prediction(source) or "eps"),
    ("unet", "noise schedules", lambda source: "zero SNR" if declared_zero_snr(source) else "sdxl"),
    ("unet", "latents", _latents),
)


def _left_out(terms: Mapping[str, Terms], sources: Sequence[WeightSource]) -> list[str]:
    """Return a warning for each checkpoint with tensors that the sum does not have."""
    extra = [(source.label, [name for name in source.tensors if name not in terms]) for source in sources]
    return [
        f"left out, because they belong to no module of SDXL: {counted(len(names), 'tensor')} of {label}, "
        f"{some_of(names)}"
        for label, names in extra
        if names
    ]


def _metadata(lead: WeightSource, of_vae: WeightSource, *, is_model: bool) -> dict[str, str]:
    """Return what is still true of the sum; titles, hashes and training metadata are those of the inputs."""
    declared, vae = lead.provenance, of_vae.provenance
    prediction = declared_prediction(lead)
    provenance = Provenance(
        role=Role.MODEL if is_model else None,
        version=spectune_version(),
        prediction=prediction,
        flow_shift=declared.flow_shift,
        noise_schedule=declared.noise_schedule,
        vae_scale=vae.vae_scale,
        vae_shift=vae.vae_shift,
        vae_padding=vae.vae_padding,
        vae_name=vae.vae_name,
    )
    layout = {key: text for key, text in lead.metadata.items() if key == LAYOUT_KEY}
    return layout | provenance.to_metadata() | modelspec_metadata(prediction)
