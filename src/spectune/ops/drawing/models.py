"""Load a model with adapters from files, and draw with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from PIL import Image

from spectune.adapters.adapter import AnyAdapter, TunedAdapter
from spectune.adapters.reader import open_any_adapter
from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.pipeline import report_progress
from spectune.files.provenance import Provenance
from spectune.files.source import WeightSource
from spectune.files.weights_hash import weights_hash
from spectune.model.device import cpu_warnings, drawing_dtype, parse_device
from spectune.model.memory_errors import CARD_REMEDIES, explained_memory_errors
from spectune.model.network import Sdxl, build_model
from spectune.model.offload import StagedModel, offload
from spectune.model.prediction import make_prediction
from spectune.model.vae.convention import VaeConvention, declares_vae, known_convention, resolve_convention
from spectune.model.vae.fitting import fits
from spectune.model.vae.loading import choose_vae
from spectune.ops.drawing.specs import ModelSpec, parse_size
from spectune.ops.options.pictures import DrawingOptions
from spectune.pairs.merged import merged
from spectune.pairs.rules import BaseKind, check_base_hash
from spectune.sampling.generate import Request, SampleSettings
from spectune.sampling.stages import draw_in_stages, drawing_bytes
from spectune.sdxl.layers import build_catalogue
from spectune.sdxl.prediction_type import assumed_prediction
from spectune.sdxl.vocabulary import CHUNK_TOKENS

Notify = Callable[[str], None]


@contextmanager
def open_model(spec: ModelSpec, notify: Notify) -> Generator[WeightSource]:
    """Open the weights of a model with its adapters applied. Tensors are computed when they are read."""
    with open_checkpoint(spec.model) as base:
        if not spec.adapters:
            yield base
            return
        catalogue = build_catalogue(base, all_layers=True)
        with ExitStack() as stack:
            adapters = [stack.enter_context(open_any_adapter(a.path, catalogue)) for a in spec.adapters]
            for warning in (warning for adapter in adapters for warning in adapter.warnings):
                notify(warning)
            _check_bases(base, adapters)
            model = merged(base, list(zip(adapters, [a.strength for a in spec.adapters], strict=True)))
            for warning in model.warnings:
                notify(warning)
            yield model


def _check_bases(base: WeightSource, adapters: Sequence[AnyAdapter]) -> None:
    """Raise PairingError if a tuned adapter records another base. Hashes the base only if one is recorded."""
    if BaseKind.of(base) is BaseKind.RESIDUAL:
        return
    recorded = [
        adapter for adapter in adapters if isinstance(adapter, TunedAdapter) and adapter.provenance.base_hash
    ]
    if recorded:
        base_hash = weights_hash(base)
        for adapter in recorded:
            check_base_hash(base_hash, adapter, base.label)


def load_model(
    spec: ModelSpec, options: DrawingOptions, *, device: str | None = None, dtype: torch.dtype | None = None
) -> Sdxl:
    """Load a model. Prediction, flow shift and VAE of the options override what its files declare.

    Args:
        spec: The files.
        options: The options.
        device: The device to load to. None: the device to draw on.
        dtype: The dtype of all networks but the autoencoder. None: that of the device to draw on.
    """
    target, notify = parse_device(options.device), options.notify or warn
    prediction, flow_shift = options.prediction, options.flow_shift
    declared = declared_vae(spec)
    convention = _vae_settings(options, declared)
    if options.vae is None and declared.vae_name is not None:
        notify(
            f"{spec.label} was trained with the autoencoder {declared.vae_name}, but is drawn with the one "
            f"in {spec.model.name}; pass `vae` to change that"
        )
    with open_model(spec, notify) as source:
        model = build_model(source, device=device or target, dtype=dtype or drawing_dtype(target))
        assumed = assumed_prediction(source)
    if assumed is not None and prediction is None and flow_shift is None:
        notify(f"{assumed}; pass `prediction` if it is another one")
    for warning in cpu_warnings(target, sum(weight.numel() for weight in model.unet.parameters())):
        notify(warning)
    model = choose_vae(model, options.vae, convention)
    if prediction is None and flow_shift is None:
        return model
    name = prediction or ("flow" if flow_shift is not None else model.prediction.name)
    shift = flow_shift if flow_shift is not None else getattr(model.prediction, "shift", 1.0)
    zero = getattr(model.prediction, "zero_terminal_snr", False)
    return replace(model, prediction=make_prediction(name, flow_shift=shift, zero_terminal_snr=zero))


def declared_vae(spec: ModelSpec) -> Provenance:
    """Return the provenance that declares the VAE of the training; the last adapter takes precedence."""
    for path in [*(adapter.path for adapter in reversed(spec.adapters)), spec.model]:
        with open_checkpoint(path) as file:
            declared = file.provenance
        if declares_vae(declared):
            return declared
    return Provenance()


def _vae_settings(options: DrawingOptions, declared: Provenance) -> VaeConvention:
    """Return the named convention, otherwise that of the training, otherwise the autoencoder's own."""
    if options.vae_name is not None:
        return resolve_convention(options.vae, name=options.vae_name)
    return resolve_convention(
        options.vae, scale=declared.vae_scale, shift=declared.vae_shift, padding=declared.vae_padding
    )


def warn(text: str) -> None:
    """Issue a Python warning for callers that passed no `notify`."""
    warnings.warn(text, stacklevel=2)


def sample_settings(options: DrawingOptions) -> SampleSettings:
    """Return the settings of the sampler.

    Raises InputError for an invalid value, before any file is read.
    """
    if options.vae_name is not None:
        known_convention(options.vae_name)
    if options.max_tokens % CHUNK_TOKENS:
        raise InputError(f"`max_tokens` is {options.max_tokens}: expected a multiple of {CHUNK_TOKENS}")
    size = parse_size(options.size)
    return SampleSettings(
        width=size.width,
        height=size.height,
        steps=options.steps,
        cfg=options.cfg,
        sampler=options.sampler,
        negative=options.negative,
        batch=options.batch,
        max_tokens=options.max_tokens,
    )


def draw(
    spec: ModelSpec,
    captions: Sequence[str],
    options: DrawingOptions,
    settings: SampleSettings,
    *,
    dtype: torch.dtype | None = None,
) -> list[Image.Image]:
    """Draw one picture per caption. The seeds count up from `options.seed`."""
    device = parse_device(options.device)
    dtype = dtype or drawing_dtype(device)
    requests = [Request(caption, options.seed + number) for number, caption in enumerate(captions)]

    def report(done: int) -> None:
        report_progress(options.progress, done, len(requests), spec.label)

    with explained_memory_errors(partial(_remedies, settings)):
        model = _staged(spec, options, settings, device, dtype)
        return draw_in_stages(model, requests, settings, progress=report)


def _remedies(settings: SampleSettings) -> tuple[str, ...]:
    smaller_batch = ("pass 1 as `batch`",) if settings.batch > 1 else ()
    return (*smaller_batch, CARD_REMEDIES[0], "a smaller `size`", *CARD_REMEDIES[1:])


def _staged(
    spec: ModelSpec, options: DrawingOptions, settings: SampleSettings, device: str, dtype: torch.dtype
) -> StagedModel:
    """Load a model to `device` if all its networks fit there, otherwise to main memory.

    From main memory, each network moves to the device for its work.
    """
    with open_checkpoint(spec.model) as source:
        together = drawing_bytes(source, settings, dtype)
    notify = options.notify or warn
    if fits(together, device):
        return StagedModel(load_model(spec, options, dtype=dtype), notify=notify)
    model = load_model(spec, options, device="cpu", dtype=dtype)
    networks = offload(model, ("text", "unet", "vae"), working=torch.device(device))
    networks.park()
    return StagedModel(model, networks=networks, notify=notify)
