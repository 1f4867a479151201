"""Describe a file: its content, the cost of a rank, and the spectrum of its weights."""

from __future__ import annotations

from dataclasses import replace

from spectune.adapters.detect import is_adapter
from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.writer import check_target
from spectune.operation import operation
from spectune.ops.inspect.autoencoder import VaeSummary, describe_vae, is_vae_file, is_vae_folder
from spectune.ops.inspect.summary import AdapterSummary, ModelSummary, describe_adapter, describe_model
from spectune.ops.options.model_files import InspectOptions
from spectune.pairs.spectrum_report import SpectrumReport, measure_spectra
from spectune.sdxl.layers import build_catalogue
from spectune.sdxl.selection import select_layers


@operation(InspectOptions)
def inspect(options: InspectOptions) -> ModelSummary | AdapterSummary | VaeSummary | SpectrumReport:
    """Describe a file from its header. With `spectrum`, measure the energy that each rank holds instead.

    Raises InputError if the file is neither a model nor an adapter nor an autoencoder.
    """
    if options.measures:
        return _spectrum(options)
    if is_vae_folder(options.model):
        return describe_vae(options.model)
    with open_checkpoint(options.model) as source:
        if is_vae_file(source.tensors):
            return describe_vae(options.model)
        return describe_adapter(source) if is_adapter(source) else describe_model(source)


def _spectrum(options: InspectOptions) -> SpectrumReport:
    """Measure the spectra of the selected layers and draw the plot."""
    if options.plot is not None:
        check_target(options.plot, 0, force=options.force)
    with open_checkpoint(options.model) as source:
        if is_adapter(source):
            raise InputError(
                f"{source.label} is an adapter: expected a checkpoint",
                hint="the spectrum is that of a model; pass the one that the adapter belongs to",
            )
        catalogue = build_catalogue(source, all_layers=True)
        selected = replace(catalogue, layers=select_layers(catalogue, options.layers))
        spectra = measure_spectra(source, selected, options.progress)
    if options.plot is not None:
        from spectune.ops.inspect.plot import draw_spectrum  # matplotlib takes 0.5 s to import

        draw_spectrum(spectra, options.plot)
    return spectra
