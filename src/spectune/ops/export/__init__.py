"""Export: an adapter, or the difference of two checkpoints, as a plain LoRA file."""

from __future__ import annotations

from spectune.errors import InputError
from spectune.files.writer import check_target
from spectune.operation import operation
from spectune.ops.export.adapter import export_adapter
from spectune.ops.export.difference import export_difference
from spectune.ops.export.report import ExportReport
from spectune.ops.options.adapter_files import ExportOptions
from spectune.ops.shared import is_checkpoint


@operation(ExportOptions)
def export(options: ExportOptions) -> ExportReport:
    """Write a plain LoRA of a tuned adapter, a LoRA, a trained principal, or a tuned checkpoint.

    A checkpoint needs `base`, the model it was made from, and takes rank 64 by default; adapters keep their
    full rank.

    Raises InputError and PairingError for files of which no LoRA can be made.
    """
    name = options.tuned.name
    check_target(options.out, 0, force=options.force)  # before any file is read
    if not is_checkpoint(options.tuned):
        if options.layers is not None:
            raise InputError(
                f"`layers` is for checkpoints, {name} is an adapter",
                hint="`spectune slice` takes layers of an adapter",
            )
        return export_adapter(options)
    if options.base is None:
        raise InputError(
            f"{name} is a whole model: its LoRA is the difference from another model",
            hint="pass the model it was made from as `base`",
        )
    if options.form != "lora" or options.principal is not None:
        raise InputError(
            f"{name} is a whole model, whose difference is a plain LoRA",
            hint="leave out `form` and `principal`",
        )
    return export_difference(options, options.base)
