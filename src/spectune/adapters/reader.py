"""Open the adapter files of any program for the layers of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from spectune.adapters.adapter import (
    ALPHA,
    DELTA_DOWN,
    DELTA_SUFFIXES,
    DELTA_UP,
    DOWN,
    FRAME_DOWN,
    FRAME_UP,
    LOW_RANK_SUFFIXES,
    MID,
    REPLACED,
    REPLACED_DTYPES,
    UP,
    Adapter,
    AnyAdapter,
    GeneralAdapter,
    LazyLayers,
    LazyTensors,
    TunedAdapter,
)
from spectune.adapters.alphas import PeftAlphas, missing_alphas, read_alpha, read_peft_alphas
from spectune.adapters.general import read_general
from spectune.adapters.kinds.pair import read_low_rank
from spectune.adapters.kinds.table import BIAS_DIFFERENCE, NORM_DIFFERENCES, OTHER_SUFFIXES
from spectune.adapters.spellings import KeyTable, sort_keys, stem_and_suffix
from spectune.checkpoints.open import open_checkpoint
from spectune.core.delta import Delta
from spectune.core.low_rank import LowRank, common_dtype
from spectune.errors import InputError, check_all, counted, printable, some_of
from spectune.files.dtypes import SAFETENSORS_NAMES
from spectune.files.reader import Checkpoint
from spectune.sdxl.layers import Catalogue, Layer, layer_of, squeezed
from spectune.sdxl.layout import SDXL
from spectune.sdxl.names import Module, Part, diffusers_name, modules_of

_KINDS = "spectune reads the keys of LoRA, LyCORIS and PEFT"
AS_PLAIN_LORA = "write it as a plain LoRA first: `spectune export MODEL FILE`"
# Keys without which a layer does something else, unlike differences of biases and norms.
ESSENTIAL = (OTHER_SUFFIXES | {MID}) - {BIAS_DIFFERENCE, *NORM_DIFFERENCES}
_DROP = "; `spectune convert --drop PATTERN` removes keys"


def open_adapter(
    path: Path, catalogue: Catalogue | None = None, *, without: Sequence[str] = ()
) -> Adapter | TunedAdapter:
    """Open an adapter whose layers are products of factors, in any spelling; layers are read on access.

    The adapter is a context manager that closes the file. A missing alpha means scale 1 and adds a warning.

    Args:
        path: The file.
        catalogue: The layers of the model that the adapter is for. By default, layers have the names of SDXL
            and the shapes of their factors.
        without: Keys to skip.

    Raises:
        InputError: For layers that the model lacks, shapes that do not fit, other kinds of adapters, and
            files that replace tensors of their base.
    """
    opened = open_any_adapter(path, catalogue, without=without, factors_only=True)
    assert not isinstance(opened, GeneralAdapter)
    return opened


def open_any_adapter(
    path: Path,
    catalogue: Catalogue | None = None,
    *,
    without: Sequence[str] = (),
    factors_only: bool = False,
) -> AnyAdapter:
    """Open an adapter of any kind for a caller that applies all of it; see `open_adapter`.

    A file with more than a product of two factors per layer requires the catalogue of its model.
    `factors_only` refuses such a file, and one that replaces tensors of its base.
    """
    source = open_checkpoint(path)
    try:
        return _opened(source, catalogue, frozenset(without), factors_only=factors_only)
    except BaseException:
        source.close()
        raise


def is_general(keys: Iterable[str]) -> bool:
    """Return whether the keys of an adapter are more than a product of two factors per layer."""
    return any(stem_and_suffix(key)[1] in OTHER_SUFFIXES for key in keys)


def _opened(
    source: Checkpoint, catalogue: Catalogue | None, without: frozenset[str], *, factors_only: bool
) -> AnyAdapter:
    if not source.tensors:
        raise InputError(f"{source.label} has no tensors: expected an adapter", hint="pass another file")
    table = sort_keys((key for key in source.tensors if key not in without), *_known_names(catalogue))
    if not (table.keys or table.others or table.foreign or table.unexpected or table.replaced):
        raise InputError(
            f"{source.label} has no keys except the {len(source.tensors)} to leave out: expected factors",
            hint="leave out fewer keys",
        )
    _check_keys(source, table, among_sdxl=catalogue is None)
    peft = read_peft_alphas(source.path, source.metadata)
    if table.general:
        _check_general(source, table, factors_only=factors_only, has_base=catalogue is not None)
        assert catalogue is not None
        opened: AnyAdapter = read_general(source, table, catalogue, peft)
    else:
        _check_factors(source, table)
        _check_replaced(source, table, used=not factors_only)
        opened = _read_factors(source, table, catalogue or _catalogue_from_factors(source, table), peft)
    return replace(opened, warnings=(*opened.warnings, *_ignored(source, table)))


def _read_factors(
    source: Checkpoint, table: KeyTable, catalogue: Catalogue, peft: PeftAlphas
) -> Adapter | TunedAdapter:
    by_name = {layer.name: layer for layer in catalogue if layer.name in table.keys}
    reader = _Reader(source, table, peft)
    check_all(by_name.values(), reader.check)
    warnings = missing_alphas(
        source, [n for n, layer in by_name.items() if reader.stored_alpha(layer) is None]
    )
    ranks = {name: reader.rank(layer) for name, layer in by_name.items()}
    dtypes = {name: reader.dtype(layer) for name, layer in by_name.items()}
    if table.tuned:
        deltas = LazyLayers(ranks, dtypes, lambda name: reader.delta(by_name[name]))
        infos = {name: source.tensors[f"{REPLACED}{name}"] for name in table.replaced}
        tensors = LazyTensors(infos, lambda name: source.load(f"{REPLACED}{name}"))
        return TunedAdapter(deltas, source.metadata, source.label, warnings, source, catalogue, tensors)
    low_ranks = LazyLayers(ranks, dtypes, lambda name: reader.low_rank(by_name[name]))
    return Adapter(low_ranks, source.metadata, source.label, warnings, source, catalogue)


def _known_names(catalogue: Catalogue | None) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Return the paths in a pipeline of all layers, and of the modules that are not layers, by name."""
    if catalogue is None:
        return _sdxl_paths()
    layers = {layer.name: layer.diffusers for layer in catalogue}
    others = {
        module.layer: diffusers_name(module.layer, catalogue.unet)
        for module in catalogue.modules
        if module.layer not in layers
    }
    return layers, others


def _ignored(source: Checkpoint, table: KeyTable) -> tuple[str, ...]:
    """Return a warning about embedded textual inversions, which no weight of a model can hold."""
    if not table.embeddings:
        return ()
    names = some_of([printable(name) for name in table.embeddings])
    return (
        f"{counted(len(table.embeddings), 'embedding')} of {source.label} ignored: new words for prompts, "
        f"which no weight can hold: {names}",
    )


def _check_general(source: Checkpoint, table: KeyTable, *, factors_only: bool, has_base: bool) -> None:
    if table.tuned or table.replaced:
        raise InputError(
            f"{source.label} has keys of a tuned adapter and of another kind of adapter: expected one kind",
            hint="the file was merged from two files: use each of them alone",
        )
    if factors_only:
        other = {key: suffix for keys in table.others.values() for suffix, key in keys.items()}
        other |= {
            key: suffix
            for keys in table.keys.values()
            for suffix, key in keys.items()
            if suffix in OTHER_SUFFIXES
        }
        raise InputError(
            f"{source.label} has {counted(len(other), 'key')} other than factors: {some_of(list(other))}; "
            f"expected {', '.join(LOW_RANK_SUFFIXES)}",
            hint=AS_PLAIN_LORA + ("" if ESSENTIAL.intersection(other.values()) else _DROP),
        )
    if not has_base:
        raise InputError(
            f"{source.label} changes complete weights: reading it requires its model",
            hint="pass the model as `base`",
        )


def _check_keys(source: Checkpoint, table: KeyTable, *, among_sdxl: bool) -> None:
    """Raise one InputError for all keys that cannot be read."""
    problems: dict[str, str] = {}  # what is wrong -> hint
    if table.foreign:
        count = len(table.keys) + len(table.foreign)
        model = "SDXL" if among_sdxl else "the model"
        what = (
            f"{len(table.foreign)} of {count} layers of {source.label} have no counterpart in {model}: "
            f"{some_of(table.foreign)}"
        )
        problems[what] = _foreign_hint(table.foreign, among_sdxl=among_sdxl)
    if table.unexpected:
        unknown, count = some_of([printable(key) for key in table.unexpected]), len(table.unexpected)
        what = f"{source.label} has {counted(count, 'key')} of no known kind of adapter: {unknown}"
        problems[what] = "merge it with the program that made it, or use `spectune convert --drop PATTERN`"
    if table.duplicates:
        one, other = table.duplicates[0]
        what = f"{source.label} has {counted(len(table.duplicates), 'factor')} twice: {one} and {other}"
        problems[what] = "the file has the same layers in two spellings" + _DROP
    if problems:
        raise InputError("; ".join(problems), hint="; ".join(dict.fromkeys(problems.values())))


def _check_factors(source: Checkpoint, table: KeyTable) -> None:
    """Raise InputError for a layer with missing factors, or with factors and deltas."""
    expected = DELTA_SUFFIXES if table.tuned else LOW_RANK_SUFFIXES
    for name, suffixes in table.keys.items():
        optional = () if table.tuned else (MID,)
        unexpected = sorted(set(suffixes) - {*expected, *optional})
        if unexpected:
            raise InputError(
                f"{name} of {source.label} has `{unexpected[0]}`: expected {', '.join(expected)}", hint=_KINDS
            )
        missing = [suffix for suffix in expected if suffix != ALPHA and suffix not in suffixes]
        if missing:
            raise InputError(f"{name} of {source.label} has no `{missing[0]}`", hint="the file is incomplete")


def is_essential(key: str) -> bool:
    """Return whether a layer does something else without this key of it, unlike a bias or norm."""
    return stem_and_suffix(key)[1] in ESSENTIAL


def _check_replaced(source: Checkpoint, table: KeyTable, *, used: bool) -> None:
    if not table.replaced:
        return
    replaces = f"{counted(len(table.replaced), 'tensor')} of its base (first {table.replaced[0]})"
    if not table.tuned:
        raise InputError(
            f"{source.label} replaces {replaces} but is not a tuned adapter: expected {FRAME_DOWN} and the "
            "other factors of a tuned adapter",
            hint="the file is incomplete, or was merged from two files",
        )
    if not used:
        raise InputError(
            f"{source.label} replaces {replaces}, which factors cannot store",
            hint="rebuild the checkpoint with `spectune rebuild`, or write the closest LoRA with "
            "`spectune export MODEL FILE`",
        )
    for name in table.replaced:
        dtype = source.tensors[f"{REPLACED}{name}"].dtype
        if dtype not in REPLACED_DTYPES:
            expected = ", ".join(SAFETENSORS_NAMES[known] for known in REPLACED_DTYPES)
            raise InputError(
                f"{REPLACED}{name} of {source.label} is {SAFETENSORS_NAMES[dtype]}: expected {expected}",
                hint="use the file as training wrote it, without a cast",
            )


def _foreign_hint(foreign: Sequence[str], *, among_sdxl: bool) -> str:
    signs = {
        "model.diffusion_model.": "the file is a checkpoint: expected an adapter",
        "lora_te_": "the adapter is for SD 1 or 2",
        "double_blocks": "the adapter is for Flux",
        "transformer.": "the adapter is for a transformer model such as Flux or SD 3",
        "joint_blocks": "the adapter is for SD 3",
    }
    for sign, text in signs.items():
        if any(_has_sign(stem, sign) for stem in foreign):
            return text
    if among_sdxl:
        return "if the model does not have SDXL's size, pass it as `base`" + _DROP
    return "expected an adapter for SDXL with kohya, PEFT or ComfyUI keys" + _DROP


def _has_sign(stem: str, sign: str) -> bool:
    # ComfyUI's names of SDXL's encoders contain `transformer.` in the middle
    return stem.startswith(sign) if sign == "transformer." else sign in stem


# The axis of the latents in the shapes of the first and the last convolution of the UNet.
_LATENT_AXES: Mapping[str, int] = {"unet.input_blocks.0.0": 1, "unet.out.2": 0}


@dataclass(frozen=True)
class _Reader:
    """A reader of the factors of a file, layer by layer."""

    source: Checkpoint
    table: KeyTable
    peft: PeftAlphas

    def key(self, layer: Layer, suffix: str) -> str:
        return self.table.keys[layer.name][suffix]

    def shape(self, layer: Layer, suffix: str) -> tuple[int, ...]:
        return self.source.tensors[self.key(layer, suffix)].shape

    def rank(self, layer: Layer) -> int:
        shape = self.shape(layer, FRAME_DOWN if self.table.tuned else DOWN)
        return shape[0] if shape else 0

    def dtype(self, layer: Layer) -> torch.dtype:
        """Return a dtype wide enough for both factors; float32 if they are computed from three."""
        if MID in self.table.keys[layer.name]:
            return torch.float32
        suffixes = (DELTA_DOWN, DELTA_UP) if self.table.tuned else (DOWN, UP)
        dtypes = [self.source.tensors[self.key(layer, suffix)].dtype for suffix in suffixes]
        for dtype in dtypes:
            if not dtype.is_floating_point:
                raise InputError(
                    f"the factors of {layer.name} in {self.source.label} are {SAFETENSORS_NAMES[dtype]}: "
                    "expected a floating-point dtype",
                    hint="use the adapter in fp16, bf16 or fp32",
                )
        return common_dtype(dtypes)

    def check(self, layer: Layer) -> None:
        """Raise InputError unless all factors fit the layer; axes of 1x1 kernels are optional."""
        rank = self.rank(layer)
        if rank == 0:
            raise InputError(
                f"{layer.name} of {self.source.label} has rank 0: it changes nothing",
                hint="the file was saved without values for this layer" + _DROP,
            )
        down, up = layer.factor_shapes(rank)
        pairs = ((FRAME_DOWN, FRAME_UP), (DELTA_DOWN, DELTA_UP)) if self.table.tuned else ((DOWN, UP),)
        fitting = {suffix: shape for pair in pairs for suffix, shape in zip(pair, (down, up), strict=True)}
        if MID in self.table.keys[layer.name]:
            fitting |= {DOWN: (*down[:2], 1, 1), MID: (rank, rank, *down[2:])}
        for suffix, expected in fitting.items():
            shape = self.shape(layer, suffix)
            if len(shape) not in (2, 4) or 0 in shape or squeezed(shape) != squeezed(expected):
                self._misfit(layer, suffix, expected)
        if ALPHA in self.table.keys[layer.name] and math.prod(self.shape(layer, ALPHA)) != 1:
            self._misfit(layer, ALPHA, ())

    def _misfit(self, layer: Layer, suffix: str, expected: tuple[int, ...]) -> None:
        axis, shape = _LATENT_AXES.get(layer.name), self.shape(layer, suffix)
        if axis is not None and axis < min(len(shape), len(expected)) and shape[axis] != expected[axis]:
            raise InputError(
                f"{self.source.label} was made for latents of {shape[axis]} channels, the model has latents "
                f"of {expected[axis]}",
                hint="pass the model that the adapter was made for",
            )
        raise InputError(
            f"{self.key(layer, suffix)} of {self.source.label} does not fit the layer {layer.name} "
            f"{layer.shape}: expected {expected}, got {self.shape(layer, suffix)}",
            hint="the adapter was probably made for another model: pass that model",
        )

    def stored_alpha(self, layer: Layer) -> float | None:
        """Return the alpha from the tensors or PEFT's configuration; None if neither has one."""
        key = self.table.keys[layer.name].get(ALPHA)
        return read_alpha(self.source, key, self.peft, layer.name, self.rank(layer), layer.diffusers)

    def low_rank(self, layer: Layer) -> LowRank:
        suffixes = self.table.keys[layer.name].keys() & {DOWN, MID, UP}
        tensors = {suffix: self._load(layer, suffix) for suffix in suffixes}
        return read_low_rank(tensors, self.stored_alpha(layer), layer.shape)

    def delta(self, layer: Layer) -> Delta:
        change = self._pair(layer, DELTA_DOWN, DELTA_UP)
        return Delta(self._pair(layer, FRAME_DOWN, FRAME_UP), change.down, change.up)

    def _pair(self, layer: Layer, down_suffix: str, up_suffix: str) -> LowRank:
        down, up = layer.factor_shapes(self.rank(layer))
        alpha = self.stored_alpha(layer)
        return LowRank(
            down=self._load(layer, down_suffix).reshape(down),
            up=self._load(layer, up_suffix).reshape(up),
            alpha=float(self.rank(layer)) if alpha is None else alpha,
        )

    def _load(self, layer: Layer, suffix: str) -> Tensor:
        return self.source.load(self.key(layer, suffix))


@cache
def _sdxl_modules() -> Mapping[str, tuple[Part, Module]]:
    """Return the modules of SDXL whose weight can be factored, by layer name."""
    return {name: (part, module) for name, (part, module) in _all_sdxl().items() if module.factorable}


@cache
def _all_sdxl() -> Mapping[str, tuple[Part, Module]]:
    return {module.layer: (part, module) for part in Part for module in modules_of(SDXL, part.value)}


@cache
def _sdxl_paths() -> tuple[Mapping[str, str], Mapping[str, str]]:
    paths = {name: diffusers_name(name, SDXL.unet) for name in _all_sdxl()}
    layers = {name: path for name, path in paths.items() if name in _sdxl_modules()}
    return layers, {name: path for name, path in paths.items() if name not in layers}


def sdxl_default_layers() -> tuple[str, ...]:
    """Return the names of the layers of SDXL that LyCORIS preset=full trains."""
    return tuple(name for name, (_, module) in _sdxl_modules().items() if module.default)


def _catalogue_from_factors(source: Checkpoint, table: KeyTable) -> Catalogue:
    """Return the layers of SDXL in a file, with the shapes of their factors."""
    suffixes = (FRAME_DOWN, FRAME_UP) if table.tuned else (DOWN, UP)
    layers: list[Layer] = []
    for name, (part, module) in _sdxl_modules().items():
        if name in table.keys:
            down, up = (source.tensors[table.keys[name][suffix]].shape for suffix in suffixes)
            mid = table.keys[name].get(MID)
            kernel = () if mid is None else source.tensors[mid].shape[2:]
            inputs = down[1:] if mid is None else (*down[1:2], *kernel)
            layers.append(layer_of(part, module, (up[0] if up else 0, *inputs), SDXL.unet))
    return Catalogue(tuple(layers), SDXL.unet)
