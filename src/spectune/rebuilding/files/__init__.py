"""The operations on whole files: what the commands split, verify, rebuild, export, slice and convert do."""

from spectune.rebuilding.files.convert import ConvertReport, convert_adapter, convert_checkpoint
from spectune.rebuilding.files.difference import export_difference
from spectune.rebuilding.files.export import ExportForm, ExportReport, export_adapter
from spectune.rebuilding.files.rebuild import RebuildReport, rebuild_checkpoint
from spectune.rebuilding.files.slice import SliceReport, slice_adapters
from spectune.rebuilding.files.slice_plan import Slice, parse_slice
from spectune.rebuilding.files.split import (
    SplitReport,
    checkpoint_stem,
    principal_name,
    residual_name,
    split_checkpoint,
)
from spectune.rebuilding.files.swap import swap_parts
from spectune.rebuilding.files.verify import verify_files

__all__ = [
    "ConvertReport",
    "ExportForm",
    "ExportReport",
    "RebuildReport",
    "Slice",
    "SliceReport",
    "SplitReport",
    "checkpoint_stem",
    "convert_adapter",
    "convert_checkpoint",
    "export_adapter",
    "export_difference",
    "parse_slice",
    "principal_name",
    "rebuild_checkpoint",
    "residual_name",
    "slice_adapters",
    "split_checkpoint",
    "swap_parts",
    "verify_files",
]
