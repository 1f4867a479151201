"""Verify: whether a residual and a principal are a checkpoint."""

from __future__ import annotations

from spectune.adapters.adapter import Adapter
from spectune.adapters.reader import open_adapter
from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.operation import operation
from spectune.ops.options.model_files import VerifyOptions
from spectune.pairs.round_trip import VerifyReport, compare_pair
from spectune.sdxl.layers import build_catalogue


@operation(VerifyOptions)
def verify(options: VerifyOptions) -> VerifyReport:
    """Compare a model, tensor by tensor, with the sum of its residual and principal; see `.ok`.

    Progress counts tensors.
    """
    with (
        open_checkpoint(options.model) as source,
        open_checkpoint(options.residual) as residual,
        open_adapter(options.principal, build_catalogue(source, all_layers=True)) as principal,
    ):
        if not isinstance(principal, Adapter):
            raise InputError(
                f"{principal.label} is a tuned adapter: expected a principal",
                hint="pass the principal that `spectune split` wrote",
            )
        return compare_pair(source, residual, principal, progress=options.progress)
