"""Does residual + principal give the model back? Every tensor is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from spectune.errors import some_of
from spectune.factor.linalg import row_norms
from spectune.factor.matrix import product, to_matrix
from spectune.factor.report import Agreement, compare, total_share
from spectune.rebuild.merge import add
from spectune.rebuild.pairing import adapter_hash, read_base_dtypes, shown
from spectune.weights.adapter import Adapter, LowRank
from spectune.weights.catalogue import Layer, build_catalogue
from spectune.weights.provenance import Provenance, WeightsHasher
from spectune.weights.reader import WeightSource

Progress = Callable[[int, int, str], None]  # tensors done, tensors in all, name of the tensor at hand

# Half an ulp of a number of magnitude 1, and half of the smallest step near zero.
_HALF_ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
_HALF_STEP = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134, torch.float32: 2.0**-150}


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the model beside what residual and principal make of it."""

    name: str
    layers: tuple[str, ...]  # the factored layers it holds; none where it must be carried byte for byte
    agreement: Agreement
    excess: float  # largest error over what rounding explains, 0 where nothing is off; above 1 is wrong
    wrong_layers: tuple[str, ...]


@dataclass(frozen=True)
class VerifyReport:
    """All tensors compared, the hashes of the three files, and in words what does not hold."""

    records: tuple[TensorRecord, ...]
    model_hash: str
    principal_hash: str
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Everything agrees as far as the type of the residual allows."""
        return not self.problems

    @property
    def exact(self) -> bool:
        """Every bit of every tensor agrees."""
        return self.ok and all(record.agreement.exact for record in self.records)

    @property
    def exact_tensors(self) -> int:
        return sum(record.agreement.exact for record in self.records)

    @property
    def share(self) -> float:
        """The bit-equal share of all numbers, 0..1."""
        return total_share(record.agreement for record in self.records)

    @property
    def max_ulp(self) -> int:
        return max((record.agreement.max_ulp for record in self.records), default=0)

    @property
    def wrong_layers(self) -> tuple[str, ...]:
        """Layers whose factors or residual are off by more than one rounding each explains."""
        return tuple(name for record in self.records for name in record.wrong_layers)


def verify(
    model: WeightSource, residual: WeightSource, principal: Adapter, *, progress: Progress | None = None
) -> VerifyReport:
    """Rebuild every tensor of `model` from the pair; compare bits, hashes and names in one pass."""
    catalogue = build_catalogue(model, all_layers=True)
    factored = {
        tensor: tuple(layer for layer in layers if layer.name in principal.layers)
        for tensor, layers in catalogue.by_tensor.items()
    }
    original = read_base_dtypes(residual)
    hasher = WeightsHasher()
    records: list[TensorRecord] = []
    misfits: list[str] = []
    for done, (name, info) in enumerate(model.tensors.items()):
        if progress is not None:
            progress(done, len(model.tensors), name)
        weight = model.load(name)
        hasher.add(name, weight)
        found = residual.tensors.get(name)
        if found is None:
            continue
        layers = factored.get(name, ())
        stored_as = original.get(name, found.dtype) if layers else found.dtype
        if found.shape != info.shape or stored_as != info.dtype:
            misfits.append(name)
            continue
        records.append(_compare(name, weight, residual.load(name), layers, principal))
    if progress is not None:
        progress(len(model.tensors), len(model.tensors), "")
    model_hash, principal_hash = hasher.hexdigest(), adapter_hash(principal)
    problems = [
        *_hash_problems(model, residual, principal, model_hash, principal_hash),
        *_name_problems(model, residual, principal, [layer.name for layer in catalogue], misfits),
        *_number_problems(records),
    ]
    return VerifyReport(tuple(records), model_hash, principal_hash, tuple(problems))


def _compare(
    name: str, weight: Tensor, residual: Tensor, layers: Sequence[Layer], principal: Adapter
) -> TensorRecord:
    if not layers:
        agreement = compare(residual, weight)
        return TensorRecord(name, (), agreement, 0.0 if agreement.exact else inf, ())
    rebuilt = residual.to(torch.float32, copy=True)
    excess: dict[str, float] = {}
    for layer in layers:
        rows = layer.row_slice
        low_rank = principal.layers[layer.name]
        rebuilt[rows] = add(rebuilt[rows], product(low_rank))
        error = (rebuilt[rows] - weight[rows].float()).abs()
        excess[layer.name] = _excess(error, _allowed(residual[rows], weight[rows], low_rank))
    return TensorRecord(
        name=name,
        layers=tuple(excess),
        agreement=compare(rebuilt.to(weight.dtype), weight),
        excess=max(excess.values()),
        wrong_layers=tuple(name for name, value in excess.items() if value > 1),
    )


def _allowed(residual: Tensor, weight: Tensor, low_rank: LowRank) -> Tensor:
    """The largest |R + P - W| per number that one rounding of R explains, before R + P is rounded itself.

    R was rounded once to its type; and the product may have been summed in another order when R was made,
    where the error of each sum is at most rank * 2**-24 * |row of up| * |column of down| (Higham 2002, 3.5).
    """
    rounding = _HALF_ULP[torch.float32]
    magnitude = residual.float().abs()
    if residual.dtype in _HALF_ULP:
        allowed = magnitude * _HALF_ULP[residual.dtype] + _HALF_STEP[residual.dtype]
    else:
        allowed = torch.zeros_like(magnitude)
    up, down = to_matrix(low_rank.up).float(), to_matrix(low_rank.down).float()
    reach = row_norms(up)[:, None] * row_norms(down.T)  # (out, in*kh*kw)
    sums = 2 * (low_rank.rank + 2) * rounding * abs(low_rank.scale) * reach.reshape(residual.shape)
    final = 2 * rounding * (magnitude + weight.float().abs())
    # an fp16 -0 is written as a number in its place, see `residual`
    return allowed + sums + final + 2.0**-25 * float(weight.dtype == torch.float16)


def _excess(error: Tensor, allowed: Tensor) -> float:
    if not bool(torch.isfinite(error).all()):
        return inf
    return float((error / allowed).nan_to_num(0.0).max())  # 0/0: nothing allowed and nothing off


def _hash_problems(
    model: WeightSource, residual: WeightSource, principal: Adapter, model_hash: str, principal_hash: str
) -> list[str]:
    problems: list[str] = []
    of_residual, of_principal = (Provenance.from_metadata(file.metadata) for file in (residual, principal))
    for file, provenance in ((residual, of_residual), (principal, of_principal)):
        if provenance.base_hash not in (None, model_hash):
            problems.append(
                f"{file.label} was made from base {shown(provenance.base_hash)}, "
                f"{model.label} is {shown(model_hash)}"
            )
    bases = (of_residual.base_hash, of_principal.base_hash)
    if None not in bases and bases[0] != bases[1]:
        problems.append(
            f"{residual.label} was made from base {shown(bases[0])}, {principal.label} from {shown(bases[1])}"
        )
    if of_residual.principal_hash not in (None, principal_hash):
        problems.append(
            f"{residual.label} belongs to principal {shown(of_residual.principal_hash)}, "
            f"{principal.label} is {shown(principal_hash)}"
        )
    return problems


def _name_problems(
    model: WeightSource,
    residual: WeightSource,
    principal: Adapter,
    known_layers: Sequence[str],
    misfits: Sequence[str],
) -> list[str]:
    missing = [name for name in model.tensors if name not in residual.tensors]
    spare = [name for name in residual.tensors if name not in model.tensors]
    strange = [name for name in principal.layers if name not in set(known_layers)]
    found = (
        (missing, f"tensors of {model.label} are missing in {residual.label}"),
        (spare, f"tensors of {residual.label} are not in {model.label}"),
        (misfits, f"tensors of {residual.label} have another shape or type than in {model.label}"),
        (strange, f"layers of {principal.label} are not in {model.label}"),
    )
    return [f"{len(names)} {what}: {some_of(names)}" for names, what in found if names]


def _number_problems(records: Sequence[TensorRecord]) -> list[str]:
    problems: list[str] = []
    wrong = [name for record in records for name in record.wrong_layers]
    if wrong:
        worst = max(records, key=lambda record: record.excess if record.layers else 0.0)
        count = sum(len(record.layers) for record in records)
        problems.append(
            f"{len(wrong)} of {count} factored layers are off by more than rounding explains "
            f"(worst {worst.excess:.3g} times in {worst.name}): {some_of(wrong)}"
        )
    carried = [record.name for record in records if not record.layers and not record.agreement.exact]
    if carried:
        problems.append(f"{len(carried)} tensors outside the factored layers differ: {some_of(carried)}")
    return problems
