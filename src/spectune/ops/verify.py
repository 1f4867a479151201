"""Check that a residual and a principal, or a base and a tuned adapter, add up to a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from math import inf

from spectune.adapters.adapter import Adapter, TunedAdapter
from spectune.adapters.loading import loading_table
from spectune.adapters.reader import open_any_adapter
from spectune.checkpoints.open import open_checkpoint
from spectune.core.agreement import compare
from spectune.errors import InputError, counted, some_of
from spectune.files.pipeline import Progress, report_progress, run_pipeline
from spectune.files.source import WeightSource
from spectune.files.weights_hash import WeightsHasher, weights_hash
from spectune.operation import operation
from spectune.ops.options.model_files import VerifyOptions
from spectune.pairs.merged import Merged, merged
from spectune.pairs.round_trip import Hashes, TensorRecord, VerifyReport, compare_pair
from spectune.pairs.rules import check_base_hash
from spectune.sdxl.layers import build_catalogue


@operation(VerifyOptions)
def verify(options: VerifyOptions) -> VerifyReport:
    """Compare a model with the sum of its residual and principal, tensor by tensor.

    With a tuned adapter as `principal` and its base as `residual`, compare a rebuilt model with their sum.
    `.ok` of the report says whether they agree. Progress counts tensors.
    """
    with (
        open_checkpoint(options.model) as source,
        open_checkpoint(options.residual) as residual,
        open_checkpoint(options.principal) as file,
        open_any_adapter(options.principal, build_catalogue(source, all_layers=True)) as principal,
    ):
        if isinstance(principal, TunedAdapter):
            return _compare_rebuilt(source, residual, principal, progress=options.progress)
        if not isinstance(principal, Adapter):
            raise InputError(
                f"{principal.label} is an adapter of another kind: expected a principal",
                hint="pass the principal that `spectune split` wrote, or a tuned adapter with its base",
            )
        report = compare_pair(source, residual, principal, progress=options.progress)
        programs = {
            options.principal.name: loading_table(file, principal.catalogue),
            options.residual.name: loading_table(residual),
        }
    return replace(report, programs=programs)


def _compare_rebuilt(
    model: WeightSource, base: WeightSource, tuned: TunedAdapter, *, progress: Progress | None = None
) -> VerifyReport:
    """Compute every tensor of base + tuned adapter again, and compare its bits with those of `model`.

    Raises PairingError if the adapter was trained from another base.
    """
    expected = merged(base, [(tuned, 1.0)])
    if not isinstance(expected, Merged):
        raise InputError(
            f"{base.label} is a residual and {tuned.label} is a tuned adapter: expected a principal",
            hint="pass the principal that `spectune split` wrote, or the base of the tuned adapter",
        )
    found = model.tensors
    both = {
        name: replace(info, dtype=found[name].dtype)  # rounded once to it, as `rebuild` does
        for name, info in expected.tensors.items()
        if name in found and found[name].shape == info.shape
    }
    expected = replace(expected, tensors={**expected.tensors, **both})
    check_base_hash(weights_hash(base), tuned, base.label)
    ours, theirs = WeightsHasher(), WeightsHasher()
    records: list[TensorRecord] = []

    def work(name: str) -> TensorRecord:
        rebuilt, stored = expected.load(name), model.load(name)
        ours.add(name, stored)
        theirs.add(name, rebuilt)
        agreement = compare(rebuilt, stored)
        return TensorRecord(name, (), agreement, 0.0 if agreement.exact else inf, ())

    def take(name: str, record: TensorRecord) -> None:
        report_progress(progress, len(records), len(both), name)
        records.append(record)

    run_pipeline(list(both), work, take, size=lambda name: 3 * model.tensors[name].nbytes)
    report_progress(progress, len(records), len(records), "")
    wrong = [record.name for record in records if not record.agreement.exact]
    missing = sorted((expected.tensors.keys() | found.keys()) - both.keys())
    kinds = (
        (wrong, "differ from base + tuned adapter"),
        (missing, "are not in both models, or differ in shape"),
    )
    problems = tuple(
        f"{counted(len(names), 'tensor')} of {model.label} {what}: {some_of(names)}"
        for names, what in kinds
        if names
    )
    return VerifyReport(tuple(records), Hashes(ours.hexdigest(), theirs.hexdigest(), ""), problems)
