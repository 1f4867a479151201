"""Check that a residual and a principal add up to their checkpoint."""

from __future__ import annotations

from dataclasses import replace

from spectune.adapters.adapter import Adapter
from spectune.adapters.loading import loading_table
from spectune.adapters.reader import open_adapter
from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.operation import operation
from spectune.ops.options.model_files import VerifyOptions
from spectune.pairs.round_trip import VerifyReport, compare_pair
from spectune.sdxl.layers import build_catalogue


@operation(VerifyOptions)
def verify(options: VerifyOptions) -> VerifyReport:
    """Compare a model with the sum of its residual and principal, tensor by tensor.

    `.ok` of the report says whether they agree. Progress counts tensors.
    """
    with (
        open_checkpoint(options.model) as source,
        open_checkpoint(options.residual) as residual,
        open_checkpoint(options.principal) as file,
        open_adapter(options.principal, build_catalogue(source, all_layers=True)) as principal,
    ):
        if not isinstance(principal, Adapter):
            raise InputError(
                f"{principal.label} is a tuned adapter: expected a principal",
                hint="pass the principal that `spectune split` wrote",
            )
        report = compare_pair(source, residual, principal, progress=options.progress)
        programs = {
            options.principal.name: loading_table(file, principal.catalogue),
            options.residual.name: loading_table(residual),
        }
    return replace(report, programs=programs)
