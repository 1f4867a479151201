"""What a way of training takes of a GPU's memory, counted on the objects that a run would make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, replace
from functools import cache
from io import StringIO
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spectune.core.rank import FixedRank
from spectune.files.dtypes import parse_dtype
from spectune.model.inject import AdaptedLayer, Form, Injection, inject
from spectune.model.network import Sdxl
from spectune.model.packed_linear import NF4_BLOCK
from spectune.model.quantize import linear_layers
from spectune.sdxl.layers import Layer
from spectune.sdxl.layout import Layout
from spectune.training.memory.step import StepBytes, empty_frame, empty_model, encoding_bytes, measure_step
from spectune.training.optim.groups import build_optimizer
from spectune.training.recipe.sections.model import ALL_PARTS, PartName, Quantization
from spectune.training.state import trained_tensors

# Assumed, not measured: a CUDA context with the kernels of torch, cuBLAS and cuDNN and their workspaces, and
# what the allocator cannot use of the rest because the pieces do not fit.
CONTEXT_BYTES = 600_000_000
FRAGMENTED_SHARE = 0.05


@dataclass(frozen=True)
class Setup:
    """A way of training, in the words of a recipe."""

    rank: int
    parts: tuple[PartName, ...] = ALL_PARTS
    resolution_px: int = 1024
    batch: int = 1
    form: Form = "delta"
    quantize: Quantization = "none"
    precision: Literal["fp32", "bf16"] = "bf16"
    trained_precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    offload: tuple[Literal["text", "vae"], ...] = ()
    optimizer: str = "adamw"
    ema: bool = False

    @property
    def trains_text(self) -> bool:
        return any(part != "unet" for part in self.parts)


@dataclass(frozen=True)
class Fixed:
    """What is on the card all the time, in bytes; networks without what is trained of them."""

    unet: int
    encoders: int
    vae: int
    frame: int  # A0 and B0
    trained: int  # dA and dB, or A and B

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Memory:
    """The memory of one way of training, in bytes."""

    fixed: Fixed
    gradients: int
    optimizer: int
    average: int  # the moving average of what is trained
    kept: int  # activations between the forward and the backward pass
    working: int  # on top of them at the worst moment
    unpacked: int  # the largest quantised weight while it is multiplied with
    waiting: int  # networks that are offloaded while it trains
    encoding: int  # of the autoencoder at work on one picture, before the training

    @property
    def allocated(self) -> int:
        """The most that the training holds in tensors at once."""
        step = self.gradients + self.optimizer + self.average + self.kept + self.working + self.unpacked
        return self.fixed.total + step

    @property
    def caching(self) -> int:
        """What is held while latents are made: all networks, but no gradients and no state yet."""
        return self.fixed.total + self.waiting + self.encoding

    @property
    def reserve(self) -> int:
        """CUDA's own memory and lost pieces: an assumption."""
        return CONTEXT_BYTES + round(FRAGMENTED_SHARE * max(self.allocated, self.caching))

    @property
    def total(self) -> int:
        """What the card must have."""
        return max(self.allocated, self.caching) + self.reserve


class MemoryMeter:
    """Measures ways of training one checkpoint; what ways have in common is measured once."""

    def __init__(self, layout: Layout, layers: Iterable[Layer]) -> None:
        self._layout = layout
        self._layers = tuple(layers)
        self._inventories: dict[Setup, Inventory] = {}
        self._steps: dict[Setup, StepBytes] = {}
        self._encodings: dict[int, int] = {}

    def measure(self, setup: Setup) -> Memory:
        """The memory of a way of training.

        Raises SpectuneError when the package of the optimiser is not installed.
        """
        step = self._step(setup)
        known = self._without_step(setup, step.reached)
        return replace(known, kept=step.kept, working=step.peak - step.kept)

    def least(self, setup: Setup) -> int:
        """What a way of training takes at least, known without a step."""
        known = (step.reached for other, step in self._steps.items() if other.parts == setup.parts)
        return self._without_step(setup, next(known, frozenset())).total

    def inventory(self, setup: Setup) -> Inventory:
        """What a run of `setup` would have in place."""
        key = replace(_plain(setup), resolution_px=1024, batch=1, gradient_checkpointing=False)
        if key not in self._inventories:
            self._inventories[key] = _inventory(*self._built(setup))
        return self._inventories[key]

    def _without_step(self, setup: Setup, reached: frozenset[str]) -> Memory:
        """The memory without activations, where the trained tensors `reached` get gradients."""
        found = self.inventory(setup)
        moved = [tensor for name, tensor in found.trained.items() if name in reached]
        weights = found.weights[setup.quantize]
        text, vae = "text" in setup.offload, "vae" in setup.offload
        return Memory(
            fixed=Fixed(
                unet=weights.unet,
                encoders=0 if text else weights.encoders,
                vae=0 if vae else weights.vae,
                frame=found.frame,
                trained=_bytes(found.trained.values()),
            ),
            gradients=_bytes(moved),
            optimizer=optimizer_bytes(setup.optimizer, moved, from_zero=setup.form == "delta"),
            average=sum(4 * tensor.numel() for tensor in found.trained.values()) if setup.ema else 0,
            kept=0,
            working=0,
            unpacked=weights.unpacked,
            waiting=(weights.encoders if text else 0) + (weights.vae if vae else 0),
            encoding=self._encoding(setup.resolution_px),
        )

    def _built(self, setup: Setup) -> tuple[Sdxl, Injection]:
        rule = FixedRank(setup.rank)
        model = empty_model(self._layout, parse_dtype(setup.precision))
        frames = {
            layer.name: empty_frame(layer, rule.requested(layer.shape))
            for layer in self._layers
            if layer.part.value in setup.parts
        }
        dtype = parse_dtype(setup.trained_precision)
        return model, inject(model, frames, form=setup.form, dtype=dtype)

    def _step(self, setup: Setup) -> StepBytes:
        key = _plain(setup)
        if key not in self._steps:
            model, injection = self._built(setup)
            self._steps[key] = measure_step(
                model,
                trained_tensors(injection.named_deltas()),
                checkpointing=setup.gradient_checkpointing,
                batch=setup.batch,
                resolution_px=setup.resolution_px,
            )
        return self._steps[key]

    def _encoding(self, resolution_px: int) -> int:
        if resolution_px not in self._encodings:
            model = empty_model(self._layout, torch.bfloat16)
            self._encodings[resolution_px] = encoding_bytes(model, resolution_px)
        return self._encodings[resolution_px]


def _plain(setup: Setup) -> Setup:
    """Without what activations do not depend on: a quantised layer keeps as little as a frozen one."""
    return replace(setup, quantize="none", offload=(), optimizer="adamw", ema=False)


# ---------------------------------------------------------------- what is in place


@dataclass(frozen=True)
class Weights:
    """The frozen networks in bytes, without frames and what is trained."""

    unet: int
    encoders: int
    vae: int
    unpacked: int  # the largest of the quantised weights as it is multiplied with


@dataclass(frozen=True)
class Inventory:
    """A model with its adapters."""

    weights: Mapping[Quantization, Weights]
    frame: int  # bytes
    trained: Mapping[str, nn.Parameter]  # on the meta device


def _inventory(model: Sdxl, injection: Injection) -> Inventory:
    frames = [tensor for layer in injection.layers.values() for tensor in layer.buffers(recurse=False)]
    apart = {id(tensor) for tensor in (*frames, *injection.parameters())}
    kinds: tuple[Quantization, ...] = get_args(Quantization)
    return Inventory(
        weights={kind: _weights(model, apart, kind) for kind in kinds},
        frame=_bytes(frames),
        trained=trained_tensors(injection.named_deltas()),
    )


def _weights(model: Sdxl, apart: set[int], quantize: Quantization) -> Weights:
    packed = {} if quantize == "none" else {id(weight): weight for weight in _linear_weights(model)}

    def network(module: nn.Module | None) -> int:
        tensors = () if module is None else (*module.parameters(), *module.buffers())
        return sum(
            quantised_bytes(tensor, quantize) if id(tensor) in packed else tensor.nbytes
            for tensor in tensors
            if id(tensor) not in apart
        )

    return Weights(
        unet=network(model.unet),
        encoders=network(model.te1) + network(model.te2),
        vae=network(model.vae),
        unpacked=max((weight.nbytes for weight in packed.values()), default=0),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _linear_weights(model: Sdxl) -> list[Tensor]:
    """The weights that `quantize_layers` quantizes, adapted or not."""
    found: list[Tensor] = []
    for name in linear_layers(model):
        parent, attribute = model.place(name)
        layer = getattr(parent, attribute)
        found.append(layer.base.weight if isinstance(layer, AdaptedLayer) else layer.weight)
    return found


def quantised_bytes(weight: Tensor, quantize: Quantization) -> int:
    """The bytes of a matrix (out, in) as packed_linear.py packs it, with its float32 scales."""
    match quantize:
        case "none":
            return weight.nbytes
        case "int8":
            return weight.numel() + 4 * weight.shape[0]
        case "nf4":
            return -(-weight.numel() // 2) + 4 * -(-weight.numel() // NF4_BLOCK)


# ---------------------------------------------------------------- the optimiser's state


def optimizer_bytes(name: str, trained: Iterable[Tensor], *, from_zero: bool) -> int:
    """The state that an optimiser keeps of tensors after a step, counted on a real one of each shape.

    `from_zero`: they start at zero, which some optimisers need not remember.
    Raises SpectuneError when its package is not installed.
    """
    shapes = Counter((tuple(tensor.shape), tensor.dtype) for tensor in trained)
    return sum(
        count * _state_bytes(name, shape, dtype, from_zero=from_zero)
        for (shape, dtype), count in shapes.items()
    )


@cache
def _state_bytes(name: str, shape: tuple[int, ...], dtype: torch.dtype, *, from_zero: bool) -> int:
    sample = nn.Parameter((torch.zeros if from_zero else torch.ones)(shape, dtype=dtype))
    sample.grad = torch.full_like(sample, 1e-3)
    with redirect_stderr(StringIO()):  # some remark on how few tensors these are
        optimizer = build_optimizer(name, [{"params": [sample], "part": "unet"}])
        optimizer.step()
    return _bytes(leaf for leaf in tree_leaves(dict(optimizer.state[sample])) if isinstance(leaf, Tensor))
