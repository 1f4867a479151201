"""Pictures of models given as files: what `sample` and `compare` share."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from spectune.adapters.adapter import Adapter, TunedAdapter
from spectune.adapters.reader import open_adapter
from spectune.checkpoints.open import open_checkpoint
from spectune.cli.arguments import ModelSpec
from spectune.cli.console import print_warning
from spectune.errors import InputError
from spectune.files.provenance import Provenance, Role
from spectune.files.source import WeightSource
from spectune.files.weights_hash import weights_hash
from spectune.model.network import Sdxl, build_model
from spectune.model.prediction import make_prediction
from spectune.model.vae_loading import choose_vae
from spectune.model.vae_settings import VaeConvention, resolve_vae, says_vae
from spectune.pairs.merged import merged
from spectune.pairs.rules import check_base_hash
from spectune.sampling.contact_sheet import Column
from spectune.sdxl.layers import build_catalogue

SIDECAR = "metadata.jsonl"  # the default of data.caption.sidecar


@contextmanager
def open_model(spec: ModelSpec) -> Iterator[WeightSource]:
    """The weights of a model with its adapters applied, computed when they are asked for."""
    with open_checkpoint(spec.model) as base:
        if not spec.adapters:
            yield base
            return
        catalogue = build_catalogue(base, all_layers=True)
        with ExitStack() as stack:
            adapters = [
                stack.enter_context(open_adapter(a.path, catalogue, replaced=True)) for a in spec.adapters
            ]
            for warning in (warning for adapter in adapters for warning in adapter.warnings):
                print_warning(warning)
            _check_bases(base, adapters)
            model = merged(base, list(zip(adapters, [a.strength for a in spec.adapters], strict=True)))
            for warning in model.warnings:
                print_warning(warning)
            yield model


def _check_bases(base: WeightSource, adapters: Sequence[Adapter | TunedAdapter]) -> None:
    """Raise PairingError for a tuned adapter of another base; the base is read only where one is recorded."""
    if base.provenance.role is Role.RESIDUAL:
        return
    recorded = [
        adapter for adapter in adapters if isinstance(adapter, TunedAdapter) and adapter.provenance.base_hash
    ]
    if recorded:
        found = weights_hash(base)
        for adapter in recorded:
            check_base_hash(found, adapter, base.label)


@dataclass(frozen=True)
class VaeRequest:
    """The autoencoder that the user asks for; None: as the files say."""

    path: Path | None = None
    name: str | None = None  # of a known convention


@dataclass(frozen=True)
class Device:
    """Where pictures are computed and in which type."""

    name: str
    dtype: torch.dtype


def best_device() -> Device:
    """A GPU in 16 bits where there is one, else the CPU in float32."""
    if torch.cuda.is_available():
        # older cards only emulate bf16, slowly
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Device("cuda", torch.bfloat16 if native else torch.float16)
    if torch.backends.mps.is_available():
        return Device("mps", torch.float16)
    return Device("cpu", torch.float32)


def load_model(
    spec: ModelSpec,
    *,
    prediction: str | None = None,
    flow_shift: float | None = None,
    vae: VaeRequest | None = None,
    dtype: torch.dtype | None = None,
) -> Sdxl:
    """The model in memory; `prediction`, `flow_shift` and `vae` overrule what the files say of themselves."""
    device, vae = best_device(), vae or VaeRequest()
    told = declared_vae(spec)
    convention = chosen_convention(vae, told)
    if vae.path is None and told.vae_name is not None:
        print_warning(
            f"{spec.label} was trained with the autoencoder {told.vae_name}, and is drawn with that of "
            f"{spec.model.name}: pass --vae"
        )
    with open_model(spec) as source:
        model = build_model(source, device=device.name, dtype=dtype or device.dtype)
    model = choose_vae(model, vae.path, convention)
    if prediction is None and flow_shift is None:
        return model
    name = prediction or ("flow" if flow_shift is not None else model.prediction.name)
    shift = flow_shift if flow_shift is not None else getattr(model.prediction, "shift", 1.0)
    zero = getattr(model.prediction, "zero_terminal_snr", False)
    return replace(model, prediction=make_prediction(name, flow_shift=shift, zero_terminal_snr=zero))


def declared_vae(spec: ModelSpec) -> Provenance:
    """What the files say of the autoencoder that the model was trained with; a later adapter comes first."""
    for path in [*(adapter.path for adapter in reversed(spec.adapters)), spec.model]:
        with open_checkpoint(path) as file:
            told = file.provenance
        if says_vae(told):
            return told
    return Provenance()


def chosen_convention(vae: VaeRequest, told: Provenance) -> VaeConvention:
    """The convention that the user names, else that of the training, else that of the autoencoder itself."""
    if vae.name is not None:
        return resolve_vae(vae.path, vae.name, None, None, None)
    return resolve_vae(vae.path, None, told.vae_scale, told.vae_shift, told.vae_padding)


def file_name(number: int, caption: str) -> str:
    """`003-a-red-balloon.png`: sortable, and legal on every system."""
    words = re.sub(r"[^\w]+", "-", caption.lower()).strip("-")[:60].strip("-")
    return f"{number:03d}-{words}.png" if words else f"{number:03d}.png"


def picture_files(folder: Path, captions: Sequence[str]) -> list[Path]:
    """Where the pictures of these captions go."""
    return [folder / file_name(number, caption) for number, caption in enumerate(captions)]


def refuse_existing(targets: Sequence[Path], *, force: bool) -> None:
    """Raise InputError, before any work, when a file would be overwritten without `force`."""
    existing = [target for target in targets if target.exists()]
    if existing and not force:
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise InputError(
            f"{existing[0]}{more} exists", hint="pass --force to overwrite, or -o for another place"
        )


def save_pictures(targets: Sequence[Path], captions: Sequence[str], pictures: Sequence[Image.Image]) -> None:
    """PNG files with their captions as text chunks."""
    for target, caption, picture in zip(targets, captions, pictures, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        text = PngInfo()
        text.add_itxt("caption", caption)
        picture.save(target, pnginfo=text)


def save_sidecar(target: Path, pictures: Sequence[Path], captions: Sequence[str]) -> None:
    """The captions by file name, one JSON object a line, as a training reads them."""
    rows = (
        {"file_name": picture.name, "text": caption}
        for picture, caption in zip(pictures, captions, strict=True)
    )
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def read_pictures(folder: Path, label: str) -> tuple[Column, list[str]]:
    """The PNG files of a folder in the order of their names, with their captions."""
    files = sorted(folder.glob("*.png"))
    if not files:
        raise InputError(
            f"{folder} holds no .png pictures", hint="make them with `spectune sample ... -o FOLDER`"
        )
    pictures, captions = [], []
    for file in files:
        with Image.open(file) as picture:
            captions.append(str(picture.info.get("caption", file.stem)))
            pictures.append(picture.convert("RGB"))
    return Column(label, pictures), captions
