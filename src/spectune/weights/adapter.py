"""Adapter files: low-rank factors per layer as other programs load them, and trained deltas."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from spectune.errors import InputError, some_of
from spectune.weights.catalogue import Catalogue, Kind, Layer
from spectune.weights.names import is_peft_key, kohya_stem, split_adapter_key
from spectune.weights.provenance import Provenance, Role, modelspec_metadata, spectune_version
from spectune.weights.reader import Checkpoint, TensorInfo, open_checkpoint
from spectune.weights.writer import RESERVE_BYTES, StreamWriter

DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"
FRAME_DOWN, FRAME_UP = "frame_down.weight", "frame_up.weight"
DELTA_DOWN, DELTA_UP = "delta_down.weight", "delta_up.weight"
LOW_RANK_SUFFIXES = (DOWN, UP, ALPHA)
DELTA_SUFFIXES = (FRAME_DOWN, FRAME_UP, DELTA_DOWN, DELTA_UP, ALPHA)

T = TypeVar("T")


@dataclass(frozen=True)
class LowRank:
    """A matrix of low rank: scale * up @ down."""

    down: Tensor  # (rank, in) or (rank, in, kh, kw)
    up: Tensor  # (out, rank) or (out, rank, 1, 1)
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Delta:
    """What training added to a frame: W' = W + scale * (up @ (frame.down + down) + frame.up @ down)."""

    frame: LowRank
    down: Tensor  # same shape as frame.down
    up: Tensor  # same shape as frame.up


@dataclass(frozen=True)
class _Layers(Generic[T]):
    layers: Mapping[str, T]  # by the layer's canonical name
    metadata: Mapping[str, str]
    label: str
    warnings: tuple[str, ...] = ()  # what the file left open and how it was read
    file: Checkpoint | None = None  # from which layers are read on access; closed on leaving the context

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file is not None:
            self.file.close()


class Adapter(_Layers[LowRank]):
    """A low-rank matrix per layer: a principal or any LoRA."""


class TunedAdapter(_Layers[Delta]):
    """A trained delta per layer."""


class LazyLayers(Mapping[str, T], Generic[T]):
    """Layers that are read from their file whenever they are asked for."""

    def __init__(self, names: Sequence[str], read: Callable[[str], T]) -> None:
        self._names = dict.fromkeys(names)
        self._read = read

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_adapter(path: Path, catalogue: Catalogue) -> Adapter | TunedAdapter:
    """Open an adapter of the model that `catalogue` describes; its layers are read on access.

    The file stays open until the adapter, a context manager, is left.
    Raises InputError for layers that the model does not have, shapes that do not fit them, and kinds of
    adapter that are not a product of two factors. A missing alpha means scale 1 and is noted in `warnings`.
    """
    source = open_checkpoint(path)
    try:
        return _opened(source, catalogue)
    except BaseException:
        source.close()
        raise


def _opened(source: Checkpoint, catalogue: Catalogue) -> Adapter | TunedAdapter:
    suffixes = _suffixes_by_stem(source, catalogue)
    tuned = any(FRAME_DOWN in found for found in suffixes.values())
    expected = DELTA_SUFFIXES if tuned else LOW_RANK_SUFFIXES
    for stem, found in suffixes.items():
        _check_suffixes(source, stem, found, expected)
    layers = [layer for layer in catalogue if layer.kohya in suffixes]
    for layer in layers:
        _check_shapes(source, layer, expected)
    bare = [layer.name for layer in layers if ALPHA not in suffixes[layer.kohya]]
    no_alpha = f"{len(bare)} layers of {source.label} have no alpha, read as scale 1: {some_of(bare)}"
    warnings = (no_alpha,) if bare else ()
    names = [layer.name for layer in layers]
    if tuned:
        deltas = LazyLayers(names, lambda name: _read_delta(source, kohya_stem(name)))
        return TunedAdapter(deltas, source.metadata, source.label, warnings, source)
    low_ranks = LazyLayers(names, lambda name: _read_low_rank(source, kohya_stem(name), DOWN, UP))
    return Adapter(low_ranks, source.metadata, source.label, warnings, source)


def _suffixes_by_stem(source: Checkpoint, catalogue: Catalogue) -> dict[str, set[str]]:
    """The suffixes of the keys of each layer; every key must belong to a layer of the catalogue."""
    found: dict[str, set[str]] = {}
    for key in source.tensors:
        stem, suffix = split_adapter_key(key)
        found.setdefault(stem, set()).add(suffix)
    foreign = [stem for stem in found if stem not in catalogue.by_kohya]
    if not found:
        raise InputError(f"{source.label} holds no layers")
    if foreign:
        raise InputError(
            f"{len(foreign)} of {len(found)} layers of {source.label} have no partner in the model: "
            f"{some_of(foreign)}",
            hint=_spelling_hint(source, foreign),
        )
    return found


def _spelling_hint(source: Checkpoint, foreign: Sequence[str]) -> str:
    if any(is_peft_key(key) for key in source.tensors):
        return "the keys are spelled as PEFT or diffusers do, which cannot be read yet; kohya keys can"
    if any("_down_blocks_" in stem or "_up_blocks_" in stem for stem in foreign):
        return "the keys name diffusers blocks, which cannot be read yet; kohya's SDXL keys can"
    return "an adapter for SDXL in kohya or LyCORIS keys (lora_unet_input_blocks_..., lora_te1_...) is needed"


def _check_suffixes(source: Checkpoint, stem: str, found: set[str], expected: Sequence[str]) -> None:
    odd = sorted(found - set(expected))
    if odd:
        raise InputError(
            f"{stem} of {source.label} has `{odd[0]}`: expected {', '.join(expected)}",
            hint="only adapters that are a product of two factors are read: LoRA, LyCORIS locon",
        )
    missing = [suffix for suffix in expected if suffix != ALPHA and suffix not in found]
    if missing:
        raise InputError(f"{stem} of {source.label} has no `{missing[0]}`", hint="the file is incomplete")


def _check_shapes(source: Checkpoint, layer: Layer, expected: Sequence[str]) -> None:
    stem = layer.kohya
    down_suffix = DOWN if DOWN in expected else FRAME_DOWN
    rank = (source.tensors[f"{stem}.{down_suffix}"].shape or (0,))[0]
    fitting = {info.name: info.shape for info in _infos(layer, rank, torch.float32, expected)}
    for name, shape in fitting.items():
        info = source.tensors.get(name)
        if info is None or (name.endswith(ALPHA) and info.numel == 1):
            continue
        if info.shape != shape or rank == 0:
            raise InputError(
                f"{name} of {source.label} does not fit the layer {layer.name} {layer.shape}: "
                f"expected {shape}, got {info.shape}",
                hint="was the adapter made for another model?",
            )


def _read_low_rank(source: Checkpoint, stem: str, down: str, up: str) -> LowRank:
    factor = source.load(f"{stem}.{down}")
    key = f"{stem}.{ALPHA}"
    alpha = float(source.load(key).item()) if key in source.tensors else float(factor.shape[0])
    return LowRank(factor, source.load(f"{stem}.{up}"), alpha)


def _read_delta(source: Checkpoint, stem: str) -> Delta:
    frame = _read_low_rank(source, stem, FRAME_DOWN, FRAME_UP)
    return Delta(frame, source.load(f"{stem}.{DELTA_DOWN}"), source.load(f"{stem}.{DELTA_UP}"))


def factor_shapes(layer: Layer, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of down and up for a layer, as LyCORIS stores them: a 1x1 convolution keeps four axes."""
    down = (rank, *layer.shape[1:])
    up = (layer.out_features, rank) if layer.kind is Kind.LINEAR else (layer.out_features, rank, 1, 1)
    return down, up


def adapter_infos(layers: Iterable[Layer], ranks: Mapping[str, int], dtype: torch.dtype) -> list[TensorInfo]:
    """The tensors of an adapter file with `ranks` by layer name."""
    return [info for layer in layers for info in _infos(layer, ranks[layer.name], dtype, LOW_RANK_SUFFIXES)]


def _infos(layer: Layer, rank: int, dtype: torch.dtype, suffixes: Sequence[str]) -> list[TensorInfo]:
    down, up = factor_shapes(layer, rank)
    shapes = {DOWN: down, UP: up, FRAME_DOWN: down, FRAME_UP: up, DELTA_DOWN: down, DELTA_UP: up, ALPHA: ()}
    # float32: bf16 cannot hold an alpha of 257
    types = {ALPHA: torch.float32}
    return [TensorInfo(f"{layer.kohya}.{s}", types.get(s, dtype), shapes[s]) for s in suffixes]


def low_rank_tensors(stem: str, low_rank: LowRank) -> dict[str, Tensor]:
    """The tensors of one layer of an adapter file."""
    return {
        f"{stem}.{DOWN}": low_rank.down.contiguous(),
        f"{stem}.{UP}": low_rank.up.contiguous(),
        f"{stem}.{ALPHA}": torch.tensor(low_rank.alpha, dtype=torch.float32),
    }


def delta_tensors(stem: str, delta: Delta) -> dict[str, Tensor]:
    """The tensors of one layer of a tuned file; no program takes them for a LoRA."""
    return {
        f"{stem}.{FRAME_DOWN}": delta.frame.down.contiguous(),
        f"{stem}.{FRAME_UP}": delta.frame.up.contiguous(),
        f"{stem}.{ALPHA}": torch.tensor(delta.frame.alpha, dtype=torch.float32),
        f"{stem}.{DELTA_DOWN}": delta.down.contiguous(),
        f"{stem}.{DELTA_UP}": delta.up.contiguous(),
    }


class AdapterWriter:
    """Writes a principal or LoRA layer by layer, with the metadata that other programs look for.

    The ranks of all layers are known beforehand, the factors are not. `hash` is known after closing.
    """

    def __init__(
        self,
        path: Path,
        layers: Sequence[Layer],
        ranks: Mapping[str, int],
        *,
        dtype: torch.dtype,
        provenance: Provenance,
        metadata: Mapping[str, str] | None = None,
        reserve_bytes: int = RESERVE_BYTES,
        force: bool = False,
        hold: bool = False,
    ) -> None:
        described = kohya_metadata(layers, ranks, provenance, title=Path(path).stem)
        self._writer = StreamWriter(
            path,
            adapter_infos(layers, ranks, dtype),
            metadata={**described, **provenance.to_metadata(), **(metadata or {})},
            reserve_bytes=reserve_bytes,
            force=force,
            hold=hold,
        )

    @property
    def path(self) -> Path:
        return self._writer.path

    @property
    def metadata(self) -> dict[str, str]:
        return self._writer.metadata

    @property
    def hash(self) -> str:
        return self._writer.hash

    def commit(self) -> None:
        """Give a held file its name."""
        self._writer.commit()

    def abandon(self) -> None:
        """Drop a file that has not got its name."""
        self._writer.abandon()

    def write(self, layer: Layer, low_rank: LowRank) -> None:
        for name, tensor in low_rank_tensors(layer.kohya, low_rank).items():
            self._writer.write(name, tensor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._writer.waiting:
            try:
                self._writer.metadata |= {
                    "sshs_model_hash": self._writer.payload_sha256(),
                    "sshs_legacy_hash": self._writer.legacy_sha256()[:8],
                }
            except BaseException:
                self._writer.abandon()
                raise
        self._writer.__exit__(kind, error, trace)


def save_tuned(
    path: Path,
    tuned: TunedAdapter,
    provenance: Provenance,
    *,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> str:
    """Write a tuned adapter with its frame, each tensor in the type it has, and return its weights hash."""
    infos = [
        TensorInfo(key, tensor.dtype, tuple(tensor.shape))
        for name in tuned.layers
        for key, tensor in delta_tensors(kohya_stem(name), tuned.layers[name]).items()
    ]
    stamped = replace(provenance, role=Role.TUNED, version=spectune_version())
    entries = {**stamped.to_metadata(), **(metadata or {})}
    with StreamWriter(path, infos, metadata=entries, force=force) as writer:
        for name in tuned.layers:
            for key, tensor in delta_tensors(kohya_stem(name), tuned.layers[name]).items():
                writer.write(key, tensor)
    return writer.hash


def kohya_metadata(
    layers: Sequence[Layer], ranks: Mapping[str, int], provenance: Provenance, *, title: str
) -> dict[str, str]:
    """The entries by which sd-scripts, LyCORIS and model databases recognise an adapter for SDXL."""
    dim = _common_rank([layer for layer in layers if not _is_spatial(layer)], ranks)
    conv_dim = _common_rank([layer for layer in layers if _is_spatial(layer)], ranks)
    arguments = {"algo": "locon", "preset": "full", "train_norm": "False"}
    entries = {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": dim,
        "ss_network_alpha": dim,
        "ss_network_args": json.dumps({"conv_dim": conv_dim, "conv_alpha": conv_dim, **arguments}),
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
    }
    return entries | modelspec_metadata(provenance.prediction)


def _common_rank(layers: Sequence[Layer], ranks: Mapping[str, int]) -> str:
    """The rank that all layers have as far as their size allows, else sd-scripts' word `Dynamic`."""
    dim = max((ranks[layer.name] for layer in layers), default=0)
    same = all(ranks[layer.name] == min(dim, layer.full_rank) for layer in layers)
    return str(dim) if same else "Dynamic"


def _is_spatial(layer: Layer) -> bool:
    """Convolutions larger than 1x1, to which trainers apply conv_dim."""
    return layer.kind is Kind.CONV and layer.shape[2:] != (1, 1)
