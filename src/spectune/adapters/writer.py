"""Write adapter files: low-rank factors that other programs read, and trained deltas."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

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
    REPLACED_DTYPES,
    UP,
    Adapter,
    TunedAdapter,
)
from spectune.adapters.spellings import Spelling, spelled, spelled_suffix
from spectune.core.delta import Delta
from spectune.core.low_rank import LowRank
from spectune.errors import InputError
from spectune.files.provenance import Provenance, Role, modelspec_metadata, spectune_version
from spectune.files.source import TensorInfo
from spectune.files.weights_hash import WeightsHasher
from spectune.files.writer import StreamWriter
from spectune.sdxl.layers import Kind, Layer
from spectune.sdxl.names import kohya_stem

_ARGUMENTS = {"algo": "locon", "preset": "full", "train_norm": "False"}


def adapter_infos(
    layers: Iterable[Layer],
    ranks: Mapping[str, int],
    dtypes: torch.dtype | Mapping[str, torch.dtype],
    spelling: Spelling = Spelling.KOHYA,
) -> list[TensorInfo]:
    """Return the tensors of an adapter file; `ranks` and a mapping of `dtypes` are by layer name."""
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
    """Return the key of a factor; None for an alpha in a spelling without alphas."""
    if suffix == ALPHA and spelling is Spelling.DIFFUSERS:
        return None
    return f"{spelled(layer.name, layer.diffusers, spelling)}.{spelled_suffix(suffix, spelling)}"


def low_rank_tensors(layer: Layer, low_rank: LowRank, spelling: Spelling) -> dict[str, Tensor]:
    """Return the tensors of one layer; the diffusers spelling requires alpha = rank."""
    assert spelling is not Spelling.DIFFUSERS or low_rank.alpha == low_rank.rank, f"alpha of {layer.name}"
    keys = ((_key(layer, suffix, spelling), t) for suffix, t in _by_suffix(low_rank).items())
    return {key: tensor for key, tensor in keys if key is not None}


def kohya_tensors(layer_name: str, low_rank: LowRank) -> dict[str, Tensor]:
    """Return the tensors of one layer in kohya's spelling."""
    return {f"{kohya_stem(layer_name)}.{suffix}": t for suffix, t in _by_suffix(low_rank).items()}


def adapter_hash(adapter: Adapter) -> str:
    """Return the weights hash of a kohya file with these factors; reads every factor once."""
    hasher = WeightsHasher()
    for name in adapter.layers:
        for key, tensor in kohya_tensors(name, adapter.layers[name]).items():
            hasher.add(key, tensor)
    return hasher.hexdigest()


def _by_suffix(low_rank: LowRank) -> dict[str, Tensor]:
    return {
        DOWN: low_rank.down.contiguous(),
        UP: low_rank.up.contiguous(),
        ALPHA: torch.tensor(low_rank.alpha, dtype=torch.float32),
    }


def delta_tensors(stem: str, delta: Delta) -> dict[str, Tensor]:
    """Return the tensors of one layer of a tuned file; no program mistakes them for a LoRA."""
    return {
        f"{stem}.{FRAME_DOWN}": delta.frame.down.contiguous(),
        f"{stem}.{FRAME_UP}": delta.frame.up.contiguous(),
        f"{stem}.{ALPHA}": torch.tensor(delta.frame.alpha, dtype=torch.float32),
        f"{stem}.{DELTA_DOWN}": delta.down.contiguous(),
        f"{stem}.{DELTA_UP}": delta.up.contiguous(),
    }


@dataclass(frozen=True)
class AdapterHeader:
    """What the writer of an adapter file needs before the factors."""

    layers: Sequence[Layer]  # in the order of the file
    ranks: Mapping[str, int]  # by layer name, at most the full rank
    dtypes: torch.dtype | Mapping[str, torch.dtype]  # of the factors: one for all, or by layer name
    provenance: Provenance
    spelling: Spelling = Spelling.KOHYA
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])  # further entries


class AdapterWriter(StreamWriter):
    """A writer of a principal or LoRA, layer by layer, with the metadata that other programs read."""

    def __init__(self, path: Path, header: AdapterHeader, *, force: bool = False, hold: bool = False) -> None:
        check_adapter_name(path)
        kohya = kohya_metadata(header.layers, header.ranks, header.provenance, title=Path(path).stem)
        self._adapter = header
        self._alphas: dict[str, float] = {}
        super().__init__(
            path,
            adapter_infos(header.layers, header.ranks, header.dtypes, header.spelling),
            metadata={**kohya, **header.provenance.to_metadata(), **header.metadata},
            force=force,
            hold=hold,
        )

    def write_layer(self, layer: Layer, low_rank: LowRank) -> None:
        self._alphas[layer.name] = low_rank.alpha
        for name, tensor in low_rank_tensors(layer, low_rank, self._adapter.spelling).items():
            self.write(name, tensor)

    def _complete(self) -> None:
        """Add the metadata that depends on the tensors."""
        self.metadata |= alpha_metadata(self._adapter.layers, self._adapter.ranks, self._alphas)
        self.metadata |= {
            "sshs_model_hash": self.payload_sha256(),
            "sshs_legacy_hash": self.legacy_sha256()[:8],
        }
        super()._complete()


def save_tuned(
    path: Path,
    tuned: TunedAdapter,
    provenance: Provenance,
    *,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> str:
    """Write a tuned adapter with its frame, without casting, and return the weights hash.

    Tensors that replace those of the base keep their dtype too; they are read one at a time.
    """
    check_adapter_name(path)
    infos = [
        TensorInfo(key, tensor.dtype, tuple(tensor.shape))
        for name in tuned.layers
        for key, tensor in delta_tensors(kohya_stem(name), tuned.layers[name]).items()
    ]
    for name, info in tuned.replaced_infos.items():
        assert info.dtype in REPLACED_DTYPES, f"{name} is {info.dtype}"
        infos.append(replace(info, name=f"{REPLACED}{name}"))
    stamped = replace(provenance, role=Role.TUNED, version=spectune_version())
    entries = {**stamped.to_metadata(), **(metadata or {})}
    with StreamWriter(path, infos, metadata=entries, force=force) as writer:
        for name in tuned.layers:
            for key, tensor in delta_tensors(kohya_stem(name), tuned.layers[name]).items():
                writer.write(key, tensor)
        for name in tuned.replaced:
            writer.write(f"{REPLACED}{name}", tuned.replaced[name].contiguous())
    return writer.hash


def kohya_metadata(
    layers: Sequence[Layer], ranks: Mapping[str, int], provenance: Provenance, *, title: str
) -> dict[str, str]:
    """Return the metadata by which sd-scripts, LyCORIS and model databases recognize an SDXL adapter."""
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
    """Return the metadata with alphas for trainers; empty if all alphas equal the ranks."""
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
    """Raise InputError unless the name ends in .safetensors."""
    if Path(path).suffix.lower() != ".safetensors":
        raise InputError(f"cannot write {Path(path).name}: expected a name like x.safetensors")


def _common_rank(layers: Sequence[Layer], ranks: Mapping[str, int]) -> str:
    """Return the common rank, apart from layers that are too small for it, or `Dynamic` like sd-scripts."""
    dim = max((ranks[layer.name] for layer in layers), default=0)
    same = all(ranks[layer.name] == min(dim, layer.full_rank) for layer in layers)
    return str(dim) if same else "Dynamic"


def _is_spatial(layer: Layer) -> bool:
    """Whether a layer is a convolution larger than 1x1, to which trainers apply conv_dim."""
    return layer.kind is Kind.CONV and layer.shape[2:] != (1, 1)
