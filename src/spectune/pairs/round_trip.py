"""Compare residual + principal with the model that was split, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from spectune.adapters.adapter import Adapter
from spectune.adapters.loading import Loading
from spectune.adapters.writer import adapter_hash
from spectune.core.agreement import Agreement, Tally, compare, total_share
from spectune.core.linalg import copy_into, empty, new_copy, packed, scratch, scratch_copy
from spectune.core.low_rank import LowRank, Product, to_matrix
from spectune.core.residual import Exceptions, restores_every_bit, working_dtype
from spectune.errors import counted, some_of
from spectune.files.pipeline import Progress, report_progress, run_pipeline
from spectune.files.source import TensorInfo, WeightSource
from spectune.files.weights_hash import WeightsHasher
from spectune.pairs.merged import check_fits
from spectune.pairs.residual_file import is_exceptions, read_base_dtypes, read_exceptions
from spectune.pairs.rules import short_hash
from spectune.sdxl.layers import Catalogue, Layer, build_catalogue

# Half an ulp of a value of magnitude 1, and half of the smallest subnormal step.
_HALF_ULP = {
    torch.float8_e4m3fn: 2.0**-4,
    torch.float8_e5m2: 2.0**-3,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float32: 2.0**-24,
}
_SUM_ERROR = 4 * _HALF_ULP[torch.float32]
_HALF_STEP = {torch.float8_e4m3fn: 2.0**-10, torch.float8_e5m2: 2.0**-17, torch.float16: 2.0**-25}


@dataclass(frozen=True)
class TensorRecord:
    """The comparison of one tensor of the model with residual + principal."""

    name: str
    layers: tuple[str, ...]  # its factored layers; empty if the residual must store the same bytes
    agreement: Agreement
    excess: float  # largest ratio of error to rounding bound; 0 without an error, wrong above 1
    wrong_layers: tuple[str, ...]


@dataclass(frozen=True)
class Hashes:
    """The weights hashes of the model, of residual + principal, and of the principal."""

    model: str
    rebuilt: str
    principal: str


@dataclass(frozen=True)
class VerifyReport:
    """The comparison of all tensors, the hashes, and the problems found."""

    records: tuple[TensorRecord, ...]
    hashes: Hashes
    problems: tuple[str, ...]
    programs: Mapping[str, Sequence[Loading]] = field(default_factory=dict[str, Sequence[Loading]])

    @property
    def ok(self) -> bool:
        """Whether all tensors agree within the precision of the dtype of the residual."""
        return not self.problems

    @property
    def exact(self) -> bool:
        """Whether every bit of every tensor agrees."""
        return self.ok and all(record.agreement.exact for record in self.records)

    @property
    def exact_tensors(self) -> int:
        return sum(record.agreement.exact for record in self.records)

    @property
    def share(self) -> float:
        """Return the share of weights that are bit-identical, 0..1."""
        return total_share(record.agreement for record in self.records)

    @property
    def max_ulp(self) -> int:
        return max((record.agreement.max_ulp for record in self.records), default=0)

    @property
    def relative_error(self) -> float:
        """Return the largest relative error of a tensor."""
        return max((record.agreement.relative_error for record in self.records), default=0.0)

    @property
    def wrong_layers(self) -> tuple[str, ...]:
        """Return the layers with an error above the bound of one rounding of residual and factors."""
        return tuple(name for record in self.records for name in record.wrong_layers)


def compare_pair(
    model: WeightSource, residual: WeightSource, principal: Adapter, *, progress: Progress | None = None
) -> VerifyReport:
    """Rebuild every tensor of `model` from the pair; compare bits, hashes and names in one pass."""
    catalogue = build_catalogue(model, all_layers=True)
    comparison = _Comparison(model, residual, principal, catalogue)
    records: list[TensorRecord] = []

    def note(info: TensorInfo, record: TensorRecord | None) -> None:
        if record is not None:
            records.append(record)
        nonlocal done
        report_progress(progress, done, len(model.tensors), info.name)
        done += 1

    done = 0
    run_pipeline(list(model.tensors.values()), comparison.compare, note, size=lambda info: 2 * info.nbytes)
    report_progress(progress, done, done, "")
    hashes = Hashes(
        model=comparison.hasher.hexdigest(),
        principal=adapter_hash(principal),
        rebuilt=comparison.rebuilt_hasher.hexdigest(),
    )
    problems = [
        *_hash_problems(model, residual, principal, hashes),
        *_name_problems(model, residual, principal, [layer.name for layer in catalogue], comparison.misfits),
        *_value_problems(records),
        *_alpha_problems(principal),
    ]
    return VerifyReport(tuple(records), hashes, tuple(problems))


def _alpha_problems(principal: Adapter) -> list[str]:
    # a program that ignores alpha would apply a wrong scale
    wrong = [name for name, layer in principal.layers.items() if layer.alpha != layer.rank]
    return _counted_problems((wrong, "layer", f"of {principal.label} with alpha different from the rank"))


def _counted_problems(*kinds: tuple[Sequence[str], str, str]) -> list[str]:
    """Return one line for each kind of problem (names, noun, what is wrong) that has names."""
    return [f"{counted(len(names), noun)} {what}: {some_of(names)}" for names, noun, what in kinds if names]


class _Comparison:
    """A comparison of tensors; `compare` may run in several threads."""

    def __init__(
        self, model: WeightSource, residual: WeightSource, principal: Adapter, catalogue: Catalogue
    ) -> None:
        self.model, self.residual, self.principal = model, residual, principal
        self.factored = {
            tensor: tuple(layer for layer in layers if layer.name in principal.layers)
            for tensor, layers in catalogue.by_tensor.items()
        }
        self.original = read_base_dtypes(residual)
        self.hasher, self.rebuilt_hasher = WeightsHasher(), WeightsHasher()
        self._misfits: set[str] = set()

    @property
    def misfits(self) -> list[str]:
        return sorted(self._misfits)

    def compare(self, info: TensorInfo) -> TensorRecord | None:
        name = info.name
        weight = self.model.load(name)
        self.hasher.add(name, weight)
        stored_info = self.residual.tensors.get(name)
        if stored_info is None:
            return None
        layers = self.factored.get(name, ())
        dtype = self.original.get(name, stored_info.dtype) if layers else stored_info.dtype
        if stored_info.shape != info.shape or dtype != info.dtype:
            self._misfits.add(name)
            return None
        stored = self.residual.load(name)
        if not layers:
            return self._copied(name, weight, stored)
        exceptions = read_exceptions(self.residual, name, info.dtype)
        return self._factored(name, weight, stored, layers, exceptions)

    def _copied(self, name: str, weight: Tensor, stored: Tensor) -> TensorRecord:
        agreement = compare(stored, weight)
        if agreement.exact:
            self.rebuilt_hasher.copy(name, self.hasher)
        else:
            self.rebuilt_hasher.add(name, stored)
        return TensorRecord(name, (), agreement, 0.0 if agreement.exact else inf, ())

    def _factored(
        self,
        name: str,
        weight: Tensor,
        stored: Tensor,
        layers: Sequence[Layer],
        exceptions: Exceptions | None,
    ) -> TensorRecord:
        excess: dict[str, float] = {}
        covered = sum(math.prod(layer.shape) for layer in layers) == weight.numel()
        # rows outside of all layers do not change
        rebuilt = empty(tuple(weight.shape), weight.dtype) if covered else new_copy(stored, weight.dtype)
        tally = Tally() if covered and exceptions is None else None
        for layer in layers:
            rows, low_rank = layer.row_slice, self.principal.layers[layer.name]
            check_fits(layer, low_rank, self.residual.label)
            excess[layer.name] = _add_principal(rebuilt[rows], stored[rows], weight[rows], low_rank, tally)
        if exceptions is not None:
            rebuilt.view(-1)[exceptions.index] = exceptions.values
        agreement = compare(rebuilt, weight) if tally is None else tally.agreement()
        if agreement.exact:
            self.rebuilt_hasher.copy(name, self.hasher)
        else:
            self.rebuilt_hasher.add(name, rebuilt)
        return TensorRecord(
            name=name,
            layers=tuple(excess),
            agreement=agreement,
            excess=max(excess.values()),
            wrong_layers=tuple(name for name, value in excess.items() if not value <= 1),
        )


def _add_principal(
    rebuilt: Tensor, residual: Tensor, weight: Tensor, low_rank: LowRank, tally: Tally | None
) -> float:
    """Write residual + principal into `rebuilt`; return the largest ratio of error to rounding bound.

    `tally` counts the agreement of `rebuilt` and `weight`.
    """
    into, left, wanted = to_matrix(rebuilt), to_matrix(residual), to_matrix(weight)
    working = working_dtype(residual.dtype)
    relative, step = _rounding_bound(residual.dtype, weight.dtype)
    worst = 0.0
    exact_sum = restores_every_bit(residual.dtype, weight.dtype)
    product = Product(low_rank, exact=exact_sum)
    of_rows, of_columns = product.rounding()
    for tile, principal in product.tiles():
        # few buffers, each used for several values: they stay in the CPU cache
        stored = scratch_copy("actual", left[tile], working)
        original = packed("original", wanted[tile])
        expected = scratch_copy("expected", original, torch.float32)
        fits = principal.dtype == working
        exact = torch.add(
            stored, principal, out=principal if fits else scratch("sum", tuple(stored.shape), working)
        )
        copy_into(into[tile], exact)
        error = exact.sub_(expected).abs_()
        # The rounding of the residual explains almost all errors. Only other tiles need the complete bound.
        over = torch.sub(error, stored.abs_(), alpha=relative, out=stored)
        if not float(torch.amax(over)) <= step:  # true also for NaN
            allowed = left[tile].to(working).abs_().mul_(relative).add_(step)
            allowed.add_(expected.abs(), alpha=_SUM_ERROR)
            if not exact_sum:  # the residual may come from another machine, with another summation order
                allowed.addr_(of_rows[tile[0]], of_columns[tile[1]])
            worst = max(worst, _excess(error, allowed))
        if tally is not None:
            tally.add(packed("again", into[tile]), original, expected)
    return worst


def _rounding_bound(residual: torch.dtype, weight: torch.dtype) -> tuple[float, float]:
    """Return a and b of the bound a |R| + b + _SUM_ERROR |W| of |R + P - W|, before R + P is rounded.

    R was rounded once to its dtype. `split` and this check compute P and R + P in float32; the two results
    can differ where a rounding was a tie. This adds two roundings of values of up to |R| + |W|.
    """
    # `subtract_principal` stores another value for an fp16 -0
    step = _HALF_STEP.get(residual, 0.0) + _HALF_STEP.get(weight, 0.0)
    return _HALF_ULP.get(residual, 0.0) + _SUM_ERROR, step


def _excess(error: Tensor, allowed: Tensor) -> float:
    """Return the largest ratio of error to bound if an error is larger than its bound, else 0."""
    if float(torch.amax(error - allowed)) <= 0:  # false also for NaN
        return 0.0
    if not bool(torch.isfinite(error).all()):
        return inf
    return float((error / allowed).nan_to_num(0.0).max())  # 0/0: no error, with a bound of 0


def _hash_problems(
    model: WeightSource, residual: WeightSource, principal: Adapter, hashes: Hashes
) -> list[str]:
    problems: list[str] = []
    of_residual, of_principal = (file.provenance for file in (residual, principal))
    for file, provenance in ((residual, of_residual), (principal, of_principal)):
        if provenance.base_hash not in (None, hashes.model):
            problems.append(
                f"{file.label} was made from base {short_hash(provenance.base_hash)}, "
                f"{model.label} is {short_hash(hashes.model)}"
            )
    bases = (of_residual.base_hash, of_principal.base_hash)
    if None not in bases and bases[0] != bases[1]:
        problems.append(
            f"{residual.label} was made from base {short_hash(bases[0])}, "
            f"{principal.label} from {short_hash(bases[1])}"
        )
    if of_residual.principal_hash not in (None, hashes.principal):
        problems.append(
            f"{residual.label} belongs to principal {short_hash(of_residual.principal_hash)}, "
            f"{principal.label} is {short_hash(hashes.principal)}"
        )
    return problems


def _name_problems(
    model: WeightSource,
    residual: WeightSource,
    principal: Adapter,
    layers: Sequence[str],
    misfits: Sequence[str],
) -> list[str]:
    missing = [name for name in model.tensors if name not in residual.tensors]
    surplus = [name for name in residual.tensors if name not in model.tensors and not is_exceptions(name)]
    unknown = [name for name in principal.layers if name not in set(layers)]
    return _counted_problems(
        (missing, "tensor", f"of {model.label} missing in {residual.label}"),
        (surplus, "tensor", f"of {residual.label} not in {model.label}"),
        (misfits, "tensor", f"of {residual.label} with a different shape or dtype in {model.label}"),
        (unknown, "layer", f"of {principal.label} not in {model.label}"),
    )


def _value_problems(records: Sequence[TensorRecord]) -> list[str]:
    problems: list[str] = []
    wrong = [name for record in records for name in record.wrong_layers]
    if wrong:
        worst = max(records, key=lambda record: record.excess if record.layers else 0.0)
        count = sum(len(record.layers) for record in records)
        problems.append(
            f"in {len(wrong)} of {count} factored layers the error is larger than rounding explains "
            f"(worst: {worst.excess:.3g} times the bound in {worst.name}): {some_of(wrong)}"
        )
    changed = [record.name for record in records if not record.layers and not record.agreement.exact]
    return problems + _counted_problems((changed, "tensor", "outside the factored layers that changed"))
