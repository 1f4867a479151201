"""Combine complete parts of checkpoints, such as the UNet of one and the text encoders of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from spectune.checkpoints.open import open_checkpoint, open_writer
from spectune.errors import InputError, did_you_mean
from spectune.files.provenance import (
    ADAPTERS_KEY,
    PREFIX,
    Provenance,
    Role,
    modelspec_model,
    spectune_version,
)
from spectune.files.source import TensorInfo, WeightSource
from spectune.ops.options.adapter_files import SliceOptions
from spectune.ops.options.values import Slice
from spectune.ops.shared import STALE, refuse_overwriting, template_of, write_all
from spectune.ops.slice.plan import slices_metadata
from spectune.pairs.rules import check_whole_model
from spectune.sdxl.inference import infer_parts
from spectune.sdxl.layers import build_catalogue
from spectune.sdxl.layout import PARTS, part_of

_PARTS_BY_WORD: Mapping[str, tuple[str, ...]] = {**{part: (part,) for part in PARTS}, "te": ("te1", "te2")}


@dataclass(frozen=True)
class Swapped:
    """A source with each part from one of several checkpoints. Tensors outside the parts follow the UNet."""

    sources: Mapping[str, WeightSource]  # by part
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def of(cls, sources: Mapping[str, WeightSource]) -> Swapped:
        tensors = {
            name: info
            for part, source in sources.items()
            for name, info in source.tensors.items()
            if _part_source(name) == part
        }
        return cls(sources, tensors)

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.sources["unet"].metadata

    @property
    def provenance(self) -> Provenance:
        return self.sources["unet"].provenance

    @property
    def label(self) -> str:
        return " + ".join(f"{part} of {source.label}" for part, source in self.sources.items())

    def load(self, name: str) -> Tensor:
        return self.sources[_part_source(name)].load(name)


@dataclass(frozen=True)
class SwapReport:
    """The result of `slice` for checkpoints, with the file that each part comes from."""

    path: Path
    hash: str
    parts: Mapping[str, str]  # part -> file name
    tensors: int


def swap_parts(options: SliceOptions) -> SwapReport:
    """Write a checkpoint of parts (unet, vae, te1 and te2, or te for both) that are copied byte for byte.

    Every part must be named exactly once. The prediction type and all tensors outside the parts come from the
    file of the UNet, the scale and shift of the latents from the file of the VAE. Progress counts tensors.

    Raises InputError if the parts do not fit together.
    """
    slices, out = options.slices, options.out
    chosen = _chosen(slices)
    with ExitStack() as stack:
        opened = {path: stack.enter_context(open_checkpoint(path)) for path in dict.fromkeys(chosen.values())}
        for source in opened.values():
            check_whole_model(source)
        refuse_overwriting(out, list(opened.values()))
        model = Swapped.of({part: opened[chosen[part]] for part in PARTS})
        missing = [part for part in PARTS if not any(_part_source(name) == part for name in model.tensors)]
        if missing:
            label = model.sources[missing[0]].label
            raise InputError(f"{label} has no {missing[0]}", hint="take this part from another file")
        # raises InputError if the encoders do not have the width that the UNet was built for
        build_catalogue(model)
        _check_latents(model)
        infos = list(model.tensors.values())
        template = template_of(opened[chosen["unet"]])
        metadata = _metadata(model, slices, title=out.name.removesuffix(".safetensors"))
        with open_writer(out, infos, metadata=metadata, force=options.force, template=template) as writer:
            write_all(model, writer, options.progress)
    return SwapReport(out, writer.hash, {part: chosen[part].name for part in PARTS}, len(infos))


def _check_latents(model: Swapped) -> None:
    """Raise InputError if the VAE makes latents of another number of channels than the UNet predicts."""
    parts, unet, vae = infer_parts(model), model.sources["unet"], model.sources["vae"]
    if parts.vae is not None and parts.vae.unet_channels != parts.unet.out_channels:
        raise InputError(
            f"the VAE of {vae.label} makes latents of {parts.vae.unet_channels} channels, but the UNet of "
            f"{unet.label} takes {parts.unet.out_channels}",
            hint="take the VAE from the file of the UNet; `spectune convert --latent-channels` moves a UNet "
            "to the latents of another VAE",
        )


def _chosen(slices: Sequence[Slice]) -> dict[str, Path]:
    """Return the file of each part."""
    chosen: dict[str, Path] = {}
    for piece in slices:
        if piece.weight != 1:
            raise InputError(
                f"{piece}: parts of checkpoints cannot have a weight", hint="leave out the weight"
            )
        word = piece.trait or ""
        if word not in _PARTS_BY_WORD:
            raise InputError(
                f"{piece.path.name} is a checkpoint: expected one of its parts"
                + (f", got `{word}`{did_you_mean(word, _PARTS_BY_WORD)}" if word else ""),
                hint=f"write {piece.path.name}:unet; parts are {', '.join(_PARTS_BY_WORD)}",
            )
        for part in _PARTS_BY_WORD[word]:
            if part in chosen:
                raise InputError(
                    f"{part} is named twice: for {chosen[part].name} and for {piece.path.name}",
                    hint="name each part once",
                )
            chosen[part] = piece.path
    missing = [part for part in PARTS if part not in chosen]
    if missing:
        raise InputError(
            f"no file is named for {' and '.join(missing)}",
            hint=f"name a file for each of {', '.join(PARTS)}, such as {slices[0].path.name}:{missing[0]}",
        )
    return chosen


def _part_source(name: str) -> str:
    part = part_of(name)
    return part if part in PARTS else "unet"


def _metadata(model: Swapped, slices: Sequence[Slice], *, title: str) -> dict[str, str]:
    vae = model.sources["vae"].provenance
    provenance = replace(
        model.provenance,
        role=Role.MODEL,
        version=spectune_version(),
        base_hash=None,
        base_name=None,
        principal_hash=None,
        vae_scale=vae.vae_scale,
        vae_shift=vae.vae_shift,
        vae_padding=vae.vae_padding,
        vae_name=vae.vae_name,
    )
    # the adapters that the UNet's file was rebuilt with do not apply to the other parts
    ours = {f"{PREFIX}{name}" for name in provenance.__dataclass_fields__} | {ADAPTERS_KEY}
    kept = {key: text for key, text in model.metadata.items() if key not in ours and key not in STALE}
    return kept | modelspec_model(kept, title=title) | provenance.to_metadata() | slices_metadata(slices)
