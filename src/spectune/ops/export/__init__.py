"""Export an adapter, or the difference of two checkpoints, as a plain LoRA file."""

from __future__ import annotations

from dataclasses import replace

from spectune.errors import InputError
from spectune.files.writer import check_target
from spectune.operation import operation
from spectune.ops.export.adapter import export_adapter
from spectune.ops.export.difference import export_difference
from spectune.ops.export.report import ExportReport
from spectune.ops.export.tuned import export_tuned
from spectune.ops.model_card import check_card, write_card
from spectune.ops.options.adapter_files import ExportOptions
from spectune.ops.other_kinds import has_whole_tensors, is_other_kind
from spectune.ops.shared import is_checkpoint


@operation(ExportOptions)
def export(options: ExportOptions) -> ExportReport:
    """Write a plain LoRA of a tuned adapter, a LoRA, a trained principal, or a tuned checkpoint.

    For a checkpoint, `base` is required and the default rank is 64. Adapters keep their full rank by default.
    With `form` tuned, write a tuned adapter of the principal of `base`, from which a training can continue.

    Raises InputError or PairingError for files that cannot be exported as a LoRA.
    """
    check_target(options.out, 0, force=options.force)  # before any file is read
    if not options.card:
        return _export(options)
    check_card(options.out, force=options.force)
    report = _export(options)
    return replace(report, card=write_card(options.out, options.tuned, report.hash))


def _export(options: ExportOptions) -> ExportReport:
    name = options.tuned.name
    if options.form == "tuned":
        return export_tuned(options)
    if not is_checkpoint(options.tuned):
        is_whole = has_whole_tensors(options.tuned)
        if options.layers is not None and not is_whole:
            raise InputError(
                f"`layers` works with checkpoints only: {name} is an adapter",
                hint="select layers of an adapter with `spectune slice`",
            )
        if not (is_whole or is_other_kind(options.tuned)):
            return export_adapter(options)
        kind = "more than a product of two factors per layer: its LoRA is the change of a checkpoint"
    else:
        kind = "a checkpoint: its LoRA is the difference from another checkpoint"
    if options.base is None:
        raise InputError(f"{name} is {kind}", hint="pass the model it was made from as `base`")
    if options.form != "lora" or options.principal is not None:
        raise InputError(
            f"{name} is {kind.partition(':')[0]}: only a plain LoRA can be exported",
            hint="leave out `form` and `principal`",
        )
    return export_difference(options, options.base)
