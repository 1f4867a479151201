"""Commands that draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from spectune.cli.arguments import (
    ModelSpec,
    check_sheet_name,
    parse_model,
    parse_size,
    read_captions,
    unique_labels,
)
from spectune.cli.console import print_json, progress, say
from spectune.cli.pictures import (
    SIDECAR,
    VaeRequest,
    load_model,
    picture_files,
    read_pictures,
    refuse_existing,
    save_pictures,
    save_sidecar,
)
from spectune.errors import InputError
from spectune.model.vae_settings import known_convention
from spectune.sampling.contact_sheet import Column, contact_sheet, format_psnr, mean_psnr, picture_grid
from spectune.sampling.generate import Request, SampleSettings, generate


@dataclass(frozen=True)
class Overrule:
    """What the user says of a model whose file does not."""

    prediction: str | None = None
    flow_shift: float | None = None
    vae: VaeRequest | None = None


def overrule(
    *, prediction: str | None, flow_shift: float | None, vae: Path | None, vae_name: str | None
) -> Overrule:
    """Raises InputError, before anything is read, for a name of no known autoencoder."""
    if vae_name is not None:
        known_convention(vae_name)
    return Overrule(prediction=prediction, flow_shift=flow_shift, vae=VaeRequest(vae, vae_name))


def settings(*, size: str, steps: int, cfg: float, sampler: str, negative: str, batch: int) -> SampleSettings:
    edge = parse_size(size)
    return SampleSettings(
        width=edge.width,
        height=edge.height,
        steps=steps,
        cfg=cfg,
        sampler=sampler,
        negative=negative,
        batch=batch,
    )


def draw(
    spec: ModelSpec,
    captions: Sequence[str],
    seed: int,
    how: SampleSettings,
    overrule: Overrule,
    title: str,
    *,
    dtype: torch.dtype | None = None,
) -> list[Image.Image]:
    """One picture per caption, with seeds counting up from `seed`."""
    model = load_model(
        spec,
        prediction=overrule.prediction,
        flow_shift=overrule.flow_shift,
        vae=overrule.vae,
        dtype=dtype,
    )
    requests = [Request(caption, seed + number) for number, caption in enumerate(captions)]
    with progress(title) as report:
        return generate(model, requests, how, progress=lambda done: report(done, len(requests), ""))


def sample(
    spec: ModelSpec,
    captions: Sequence[str],
    seed: int,
    how: SampleSettings,
    overrule: Overrule,
    folder: Path,
    *,
    sheet: Path | None,
    metadata: bool,
    force: bool,
) -> None:
    targets = picture_files(folder, captions)
    if sheet is not None:
        check_sheet_name(sheet)
    beside = [*([] if sheet is None else [sheet]), *([folder / SIDECAR] if metadata else [])]
    refuse_existing([*targets, *beside], force=force)
    pictures = draw(spec, captions, seed, how, overrule, "sample")
    save_pictures(targets, captions, pictures)
    if metadata:
        save_sidecar(folder / SIDECAR, targets, captions)
    say(f"wrote {len(targets)} pictures to {folder}")
    if sheet is not None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        picture_grid(pictures, captions).save(sheet)
        say(f"wrote {sheet}")


def compare(
    models: Sequence[str],
    captions: list[str],
    caption_file: Path | None,
    seed: int,
    how: SampleSettings,
    overrule: Overrule,
    target: Path,
    *,
    cell_px: int,
    force: bool,
    as_json: bool,
) -> None:
    if len(models) < 2:
        raise InputError(f"{len(models)} model to compare: expected two or more")
    refuse_existing([target], force=force)
    check_sheet_name(target)
    folders = [Path(word).is_dir() and any(Path(word).glob("*.png")) for word in models]
    if all(folders):
        columns, rows = _from_folders([Path(word) for word in models])
    elif any(folders):
        raise InputError("picture folders and models cannot be compared with one another")
    else:
        rows = read_captions(captions, caption_file)
        specs = [parse_model(word) for word in models]
        labels = unique_labels(specs)
        columns = [
            Column(label, draw(spec, rows, seed, how, overrule, spec.label))
            for spec, label in zip(specs, labels, strict=True)
        ]
    target.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(columns, rows, cell_px=cell_px).save(target)
    reference = columns[0].pictures
    decibels = [mean_psnr(reference, column.pictures) for column in columns]
    if as_json:
        found = [{"model": c.label, "psnr_db": str(db)} for c, db in zip(columns, decibels, strict=True)]
        print_json({"sheet": target, "columns": found})
        return
    for column, value in zip(columns[1:], decibels[1:], strict=True):
        say(f"{column.label}: {format_psnr(value)}")
    say(f"wrote {target}")


def _from_folders(folders: Sequence[Path]) -> tuple[list[Column], list[str]]:
    read = [read_pictures(folder, folder.name) for folder in folders]
    captions = read[0][1]
    for folder, (_, found) in zip(folders, read, strict=True):
        if found != captions:
            raise InputError(
                f"{folder} and {folders[0]} show other captions", hint="sample both with the same captions"
            )
    return [column for column, _ in read], captions
