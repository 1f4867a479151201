"""Measure the memory of a run on the meta device, with the modules of a real run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor, nn

from spectune.core.rank import FixedRank
from spectune.files.dtypes import parse_dtype
from spectune.model.inject import Injection, inject
from spectune.model.network import Sdxl, denoising_bytes, new_vae, pictures_at_once
from spectune.model.packed_linear import NF4_BLOCK
from spectune.model.quantize import base_layer, linear_layers
from spectune.model.streamed_layers import large_layers
from spectune.model.vae.encoding import encoder_of
from spectune.model.vae.fitting import decoding_bytes
from spectune.model.vae.tiles import TILE_PX
from spectune.model.vae.ways import ENCODE_WAYS
from spectune.model.weight_stream import ring_size
from spectune.sdxl.layers import Layer
from spectune.sdxl.layout import Layout
from spectune.training.full.whole_tensors import train_whole, used_tensors
from spectune.training.memory.account import Fixed, Memory, Setup
from spectune.training.memory.meta_model import empty_frame, empty_model
from spectune.training.memory.optimizer_state import optimizer_bytes
from spectune.training.memory.step import StepBytes, encoding_bytes, measure_step
from spectune.training.optim.kinds import OPTIMIZERS
from spectune.training.recipe.sections.model import Quantization
from spectune.training.state import trained_tensors


@dataclass(frozen=True)
class Weights:
    """The bytes of the frozen networks, without frames and trained tensors."""

    unet: int
    encoders: int
    vae: int
    unpacked: int  # the largest quantized weight, when it is unpacked for a product
    unet_streamed: int  # the share of `unet` that streaming keeps in main memory
    encoders_streamed: int
    ring: int  # the GPU memory that streamed weights pass through


@dataclass(frozen=True)
class Inventory:
    """The tensors of a model with its adapters."""

    weights: Mapping[Quantization, Weights]
    frame: int  # bytes
    joined: int  # bytes
    trained: Mapping[str, nn.Parameter]  # on the meta device


@dataclass(frozen=True)
class _Built:
    """A model on the meta device, and its trained tensors."""

    model: Sdxl
    injection: Injection
    trained: Mapping[str, nn.Parameter]

    @property
    def joined(self) -> list[Tensor]:
        return self.injection.joined_factors.tensors()


class MemoryMeter:
    """A meter of setups for one checkpoint. Parts that setups share are measured once."""

    def __init__(self, layout: Layout, layers: Iterable[Layer]) -> None:
        self._layout = layout
        self._layers = tuple(layers)
        self._inventories: dict[Setup, Inventory] = {}
        self._steps: dict[Setup, StepBytes] = {}
        self._encodings: dict[int, dict[str, int]] = {}

    def measure(self, setup: Setup) -> Memory:
        """Measure the memory of a setup.

        Raises:
            SpectuneError: The package of the optimizer is not installed.
        """
        step = self._step(setup)
        memory = self._without_step(setup, step.reached)
        return replace(memory, kept=step.kept, working=step.peak - step.kept)

    def least(self, setup: Setup) -> int:
        """Return a lower bound of the bytes of a setup, without measuring a step."""
        reached = (step.reached for other, step in self._steps.items() if other.parts == setup.parts)
        return self._without_step(setup, next(reached, frozenset())).total

    def inventory(self, setup: Setup) -> Inventory:
        """Return the tensors of a setup."""
        key = replace(_step_key(setup), resolution_px=1024, batch=1, gradient_checkpointing=False)
        if key not in self._inventories:
            self._inventories[key] = _inventory(self._built(setup))
        return self._inventories[key]

    def _without_step(self, setup: Setup, reached: frozenset[str]) -> Memory:
        """Return the memory without activations; `reached` are the trained tensors that get gradients."""
        inventory = self.inventory(setup)
        updated = [tensor for name, tensor in inventory.trained.items() if name in reached]
        weights = inventory.weights[setup.quantize]
        if setup.stream:
            weights = _with_streaming(weights)
        text, vae = "text" in setup.offload, "vae" in setup.offload
        fixed = Fixed(
            unet=weights.unet,
            encoders=0 if text else weights.encoders,
            vae=0 if vae else weights.vae,
            frame=inventory.frame,
            joined=inventory.joined,
            trained=_bytes(inventory.trained.values()),
            stream=weights.ring if setup.stream else 0,
        )
        stepped = updated
        if setup.rank == "full" and OPTIMIZERS[setup.optimizer].tensorwise:
            stepped = [tensor.float() for tensor in updated]  # the state belongs to float32 copies
        from_zero = setup.form == "delta" and setup.rank != "full"
        optimizer = optimizer_bytes(setup.optimizer, stepped, from_zero=from_zero)
        average = sum(4 * tensor.numel() for tensor in inventory.trained.values()) if setup.ema else 0
        # between two steps, without gradients
        resident = fixed.total + optimizer + average + weights.unpacked
        sampling, decoding = _preview_bytes(self._layout, setup)
        return Memory(
            fixed=fixed,
            gradients=0 if setup.step_in_backward else _bytes(updated),
            optimizer=optimizer,
            average=average,
            kept=0,
            working=0,
            unpacked=weights.unpacked,
            encoding={way: weights.vae + nbytes for way, nbytes in self._encoding(setup).items()},
            encoding_text=weights.encoders + (0 if vae else weights.vae),
            sampling=resident + sampling,
            decoding={
                way: resident + nbytes + (weights.vae if vae else 0) for way, nbytes in decoding.items()
            },
            streamed=weights.unet_streamed + weights.encoders_streamed if setup.stream else 0,
        )

    def _built(self, setup: Setup) -> _Built:
        model = empty_model(self._layout, parse_dtype(setup.precision))
        if setup.rank == "full":
            names = used_tensors(self._layout, setup.parts)
            return _Built(model, inject(model, {}), dict(train_whole(model, names).parameters))
        rule = FixedRank(setup.rank)
        frames = {
            layer.name: empty_frame(layer, rule.requested(layer.shape))
            for layer in self._layers
            if layer.part.value in setup.parts
        }
        dtype = parse_dtype(setup.trained_precision)
        injection = inject(model, frames, form=setup.form, dtype=dtype)
        injection.joined_factors.prepare(model.unet.dtype)
        return _Built(model, injection, trained_tensors(injection.named_deltas()))

    def _step(self, setup: Setup) -> StepBytes:
        key = _step_key(setup)
        if key not in self._steps:
            built = self._built(setup)
            self._steps[key] = measure_step(built.model, built.trained, built.joined, setup)
        return self._steps[key]

    def _encoding(self, setup: Setup) -> dict[str, int]:
        """Return the bytes that encoding one image adds to the autoencoder, in each way."""
        resolution_px = setup.resolution_px
        if resolution_px not in self._encodings:
            model = empty_model(self._layout, torch.bfloat16)
            copied = 0 if model.vae is None else _bytes(model.vae.parameters()) // 2  # in bfloat16
            self._encodings[resolution_px] = {
                way: encoding_bytes(encoder_of(model, way), resolution_px)
                + (copied if way == "bfloat16" else 0)
                for way in ENCODE_WAYS
            }
        return self._encodings[resolution_px]


def _preview_bytes(layout: Layout, setup: Setup) -> tuple[int, dict[str, int]]:
    """Return the bytes of sampling a preview and, by the ways of `decode_within_memory`, of decoding it.

    Previews are squares of the training size, with classifier-free guidance.
    """
    assert layout.vae is not None
    pixels = setup.resolution_px**2
    latents = 2 * pictures_at_once(pixels) * pixels // layout.vae.pixels_per_latent**2
    with torch.device("meta"):
        halved = sum(2 * parameter.numel() for parameter in new_vae(layout.vae).parameters())
    return denoising_bytes(layout.unet, latents, parse_dtype(setup.precision).itemsize), {
        "float32": decoding_bytes(layout.vae, pixels),
        "bfloat16": halved + decoding_bytes(layout.vae, pixels, 2),
        "bfloat16 and tiles": halved + decoding_bytes(layout.vae, min(pixels, TILE_PX**2), 2),
    }


def _step_key(setup: Setup) -> Setup:
    """Return `setup` with default values of the settings that do not change activations.

    Quantization and streaming are among them: such a layer keeps the same activations as a plain one.
    """
    return replace(setup, quantize="none", offload=(), stream=False, optimizer="adamw", ema=False)


def _inventory(built: _Built) -> Inventory:
    model, layers = built.model, built.injection.layers
    frames = [tensor for layer in layers.values() for tensor in layer.buffers(recurse=False)]
    separate = {id(tensor) for tensor in (*frames, *built.trained.values())}
    kinds: tuple[Quantization, ...] = get_args(Quantization)
    return Inventory(
        weights={kind: _weights(model, separate, kind) for kind in kinds},
        frame=_bytes(frames),
        joined=_bytes(built.joined),
        trained=built.trained,
    )


def _weights(model: Sdxl, separate: set[int], quantize: Quantization) -> Weights:
    quantized = [] if quantize == "none" else [base_layer(model, name) for name in linear_layers(model)]
    packed = {id(layer.weight): layer.weight for layer in quantized}

    def stored(tensor: Tensor) -> int:
        return quantized_bytes(tensor, quantize) if id(tensor) in packed else tensor.nbytes

    def streamed(tensor: Tensor) -> int:
        return code_bytes(tensor, quantize) if id(tensor) in packed else tensor.nbytes

    def network(module: nn.Module | None) -> int:
        tensors = () if module is None else (*module.parameters(), *module.buffers())
        return sum(stored(tensor) for tensor in tensors if id(tensor) not in separate)

    large = {
        part: [streamed(weight) for weight in weights] for part, weights in _large_weights(model).items()
    }
    return Weights(
        unet=network(model.unet),
        encoders=network(model.te1) + network(model.te2),
        vae=network(model.vae),
        unpacked=max((weight.nbytes for weight in packed.values()), default=0),
        unet_streamed=sum(large["unet"]),
        encoders_streamed=sum(large["te1"]) + sum(large["te2"]),
        ring=ring_size([nbytes for sizes in large.values() for nbytes in sizes]),
    )


def _with_streaming(weights: Weights) -> Weights:
    """Return the bytes on the GPU if large weights stay in main memory."""
    return replace(
        weights,
        unet=weights.unet - weights.unet_streamed,
        encoders=weights.encoders - weights.encoders_streamed,
    )


def _large_weights(model: Sdxl) -> dict[str, list[Tensor]]:
    """Return the weights that `stream_weights` would stream, by part."""
    networks = {"unet": model.unet, "te1": model.te1, "te2": model.te2}
    return {
        part: [getattr(parent, name).weight for parent, name in large_layers(network)]
        for part, network in networks.items()
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def quantized_bytes(weight: Tensor, quantize: Quantization) -> int:
    """Return the bytes of a quantized matrix (out, in) with its float32 scales."""
    match quantize:
        case "none":
            return weight.nbytes
        case "int8":
            return code_bytes(weight, quantize) + 4 * weight.shape[0]
        case "nf4":
            return code_bytes(weight, quantize) + 4 * -(-weight.numel() // NF4_BLOCK)


def code_bytes(weight: Tensor, quantize: Quantization) -> int:
    """Return the bytes of a quantized matrix (out, in) without its scales."""
    return -(-weight.numel() // 2) if quantize == "nf4" else weight.numel()
