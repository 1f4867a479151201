"""Adapter files as they are written: low-rank factors for other programs, and trained deltas."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from spectune.adapters.adapter import (
    ALPHA,
    DELTA_DOWN,
    DELTA_UP,
    DOWN,
    FRAME_DOWN,
    FRAME_UP,
    REPLACED,
    UP,
    TunedAdapter,
)
from spectune.adapters.spellings import Spelling, spelled, spelled_suffix
from spectune.core.delta import Delta
from spectune.core.low_rank import LowRank
from spectune.errors import InputError
from spectune.files.provenance import Provenance, Role, modelspec_metadata, spectune_version
from spectune.files.source import TensorInfo
from spectune.files.writer import RESERVE_BYTES, StreamWriter
from spectune.sdxl.layers import Kind, Layer
from spectune.sdxl.names import kohya_stem

_ARGUMENTS = {"algo": "locon", "preset": "full", "train_norm": "False"}


def adapter_infos(
    layers: Iterable[Layer],
    ranks: Mapping[str, int],
    dtypes: torch.dtype | Mapping[str, torch.dtype],
    spelling: Spelling = Spelling.KOHYA,
) -> list[TensorInfo]:
    """The tensors of an adapter file with `ranks`, and `dtypes` unless all have one, by layer name."""
    infos: list[TensorInfo] = []
    for layer in layers:
        down, up = layer.factor_shapes(ranks[layer.name])
        dtype = dtypes if isinstance(dtypes, torch.dtype) else dtypes[layer.name]
        # float32: bf16 cannot hold an alpha of 257
        for suffix, kind, shape in ((DOWN, dtype, down), (UP, dtype, up), (ALPHA, torch.float32, ())):
            if key := _key(layer, suffix, spelling):
                infos.append(TensorInfo(key, kind, shape))
    return infos


def _key(layer: Layer, suffix: str, spelling: Spelling) -> str | None:
    """The key of a factor; None for an alpha in a spelling that has none."""
    if suffix == ALPHA and spelling is Spelling.DIFFUSERS:
        return None
    return f"{spelled(layer.name, layer.diffusers, spelling)}.{spelled_suffix(suffix, spelling)}"


def low_rank_tensors(layer: Layer, low_rank: LowRank, spelling: Spelling) -> dict[str, Tensor]:
    """The tensors of one layer of an adapter file; diffusers' spelling needs an alpha that is the rank."""
    assert spelling is not Spelling.DIFFUSERS or low_rank.alpha == low_rank.rank, f"alpha of {layer.name}"
    keys = ((_key(layer, suffix, spelling), t) for suffix, t in _by_suffix(low_rank).items())
    return {key: tensor for key, tensor in keys if key is not None}


def kohya_tensors(layer_name: str, low_rank: LowRank) -> dict[str, Tensor]:
    """The tensors of one layer in kohya's spelling."""
    return {f"{kohya_stem(layer_name)}.{suffix}": t for suffix, t in _by_suffix(low_rank).items()}


def _by_suffix(low_rank: LowRank) -> dict[str, Tensor]:
    return {
        DOWN: low_rank.down.contiguous(),
        UP: low_rank.up.contiguous(),
        ALPHA: torch.tensor(low_rank.alpha, dtype=torch.float32),
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

    The ranks of all layers are known beforehand, the factors are not; `dtype` is one for all or by layer.
    `hash` is known after closing.
    """

    def __init__(
        self,
        path: Path,
        layers: Sequence[Layer],
        ranks: Mapping[str, int],
        *,
        dtype: torch.dtype | Mapping[str, torch.dtype],
        provenance: Provenance,
        spelling: Spelling = Spelling.KOHYA,
        metadata: Mapping[str, str] | None = None,
        reserve_bytes: int = RESERVE_BYTES,
        force: bool = False,
        hold: bool = False,
    ) -> None:
        check_adapter_name(path)
        described = kohya_metadata(layers, ranks, provenance, title=Path(path).stem)
        self._spelling = spelling
        self._layers, self._ranks = layers, ranks
        self._alphas: dict[str, float] = {}
        self._writer = StreamWriter(
            path,
            adapter_infos(layers, ranks, dtype, spelling),
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
        self._alphas[layer.name] = low_rank.alpha
        for name, tensor in low_rank_tensors(layer, low_rank, self._spelling).items():
            self._writer.write(name, tensor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._writer.waiting:
            try:
                self._writer.metadata |= alpha_metadata(self._layers, self._ranks, self._alphas)
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
    """Write a tuned adapter with its frame, each tensor in the type it has, and return its weights hash.

    Tensors that replace those of the base are float32.
    """
    check_adapter_name(path)
    infos = [
        TensorInfo(key, tensor.dtype, tuple(tensor.shape))
        for name in tuned.layers
        for key, tensor in delta_tensors(kohya_stem(name), tuned.layers[name]).items()
    ]
    whole = {f"{REPLACED}{name}": tensor.contiguous() for name, tensor in tuned.replaced.items()}
    infos += [TensorInfo(key, torch.float32, tuple(tensor.shape)) for key, tensor in whole.items()]
    stamped = replace(provenance, role=Role.TUNED, version=spectune_version())
    entries = {**stamped.to_metadata(), **(metadata or {})}
    with StreamWriter(path, infos, metadata=entries, force=force) as writer:
        for name in tuned.layers:
            for key, tensor in delta_tensors(kohya_stem(name), tuned.layers[name]).items():
                writer.write(key, tensor)
        for key, tensor in whole.items():
            writer.write(key, tensor)
    return writer.hash


def kohya_metadata(
    layers: Sequence[Layer], ranks: Mapping[str, int], provenance: Provenance, *, title: str
) -> dict[str, str]:
    """The entries by which sd-scripts, LyCORIS and model databases recognise an adapter for SDXL."""
    dim = _common_rank([layer for layer in layers if not _is_spatial(layer)], ranks)
    conv_dim = _common_rank([layer for layer in layers if _is_spatial(layer)], ranks)
    entries = {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": dim,
        "ss_network_alpha": dim,
        "ss_network_args": json.dumps({"conv_dim": conv_dim, "conv_alpha": conv_dim, **_ARGUMENTS}),
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
    }
    return entries | modelspec_metadata(provenance.prediction)


def alpha_metadata(
    layers: Sequence[Layer], ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> dict[str, str]:
    """The entries of alphas that are not the ranks: trainers take the scale from them; empty if all are."""
    if all(alphas[layer.name] == ranks[layer.name] for layer in layers):
        return {}
    linear, spatial = (
        [alphas[layer.name] for layer in layers if _is_spatial(layer) is kind] for kind in (False, True)
    )
    arguments = {"conv_dim": _common_rank([layer for layer in layers if _is_spatial(layer)], ranks)}
    arguments |= {"conv_alpha": _common_alpha(spatial), **_ARGUMENTS}
    return {"ss_network_alpha": _common_alpha(linear), "ss_network_args": json.dumps(arguments)}


def _common_alpha(alphas: Sequence[float]) -> str:
    return f"{alphas[0]:g}" if len(set(alphas)) == 1 else "Dynamic" if alphas else "0"


def check_adapter_name(path: Path) -> None:
    """Raise InputError for a name that belongs to another kind of file."""
    if Path(path).suffix.lower() != ".safetensors":
        raise InputError(f"cannot write {Path(path).name}: expected a name like x.safetensors")


def _common_rank(layers: Sequence[Layer], ranks: Mapping[str, int]) -> str:
    """The rank that all layers have as far as their size allows, else sd-scripts' word `Dynamic`."""
    dim = max((ranks[layer.name] for layer in layers), default=0)
    same = all(ranks[layer.name] == min(dim, layer.full_rank) for layer in layers)
    return str(dim) if same else "Dynamic"


def _is_spatial(layer: Layer) -> bool:
    """Convolutions larger than 1x1, to which trainers apply conv_dim."""
    return layer.kind is Kind.CONV and layer.shape[2:] != (1, 1)
