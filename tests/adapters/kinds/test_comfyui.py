"""Kinds that ComfyUI applies, against its arithmetic written anew in float64 from the tensors of the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from spectune.adapters.kinds.change import ChangeKind, WeightChange
from spectune.adapters.kinds.dora import decomposed, magnitude_fits
from spectune.adapters.kinds.table import kinds_with

Tensors = dict[str, Tensor]
Shape = tuple[int, ...]
WEIGHTS: Mapping[str, Shape] = {"linear": (24, 20), "conv": (12, 8, 3, 3), "point": (12, 8, 1, 1)}


def noise(*shape: int, seed: int) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(shape: Shape) -> Tensors:
    ones = (1,) * (len(shape) - 2)
    return {
        "lora_down.weight": noise(3, *shape[1:], seed=1),
        "lora_up.weight": noise(shape[0], 3, *ones, seed=2),
    }


def loha(shape: Shape) -> Tensors:
    columns = shape[1:].numel() if isinstance(shape, torch.Size) else torch.Size(shape[1:]).numel()
    return {
        f"hada_w{half}_{side}": noise(*((shape[0], 3) if side == "a" else (3, columns)), seed=10 * half + i)
        for half in (1, 2)
        for i, side in enumerate("ab")
    }


def lokr(shape: Shape) -> Tensors:
    """Return a complete C (4, 2), and D from factors."""
    columns = torch.Size(shape[1:]).numel()
    return {
        "lokr_w1": noise(4, 2, seed=3),
        "lokr_w2_a": noise(shape[0] // 4, 2, seed=4),
        "lokr_w2_b": noise(2, columns // 2, seed=5),
    }


def product(t: Tensors) -> Tensor:
    return t["lora_up.weight"].flatten(1) @ t["lora_down.weight"].flatten(1) / 3


def hadamard(t: Tensors) -> Tensor:
    return (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]) / 3


def kronecker(t: Tensors) -> Tensor:
    return torch.kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"]) / 2


MAKERS: Mapping[str, tuple[Callable[[Shape], Tensors], Callable[[Tensors], Tensor]]] = {
    "pair": (pair, product),
    "loha": (loha, hadamard),
    "lokr": (lokr, kronecker),
}


def read(tensors: Tensors, alpha: float | None, shape: Shape) -> WeightChange:
    kind: ChangeKind = kinds_with(frozenset(tensors))[0]
    assert kind.fits({name: tuple(tensor.shape) for name, tensor in tensors.items()}, shape)
    return kind.read(tensors, alpha, shape)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("alpha", [None, 2.5])
@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize("kind", MAKERS)
def test_additive_kinds(kind: str, shape: str, alpha: float | None) -> None:
    size = WEIGHTS[shape]
    make, formula = MAKERS[kind]
    weight = noise(*size, seed=0)
    tensors = make(size)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    rank = 2 if kind == "lokr" else 3
    scaled = (rank if alpha is None else alpha) * formula(doubles)  # ComfyUI: scale 1 without alpha
    for strength in (1.0, 0.7, -0.4):
        expected = weight.double() + strength * scaled.reshape(size)
        actual = weight + read(tensors, alpha, size).change(weight, strength)
        assert error(actual, expected) < 1e-6
        assert error(actual, weight.double() + 1.01 * strength * scaled.reshape(size)) > 1e-5


@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize("kind", MAKERS)
def test_dora_per_input(kind: str, shape: str) -> None:
    """Every input channel of W + D gets a given norm; strengths move between W and the result."""
    size = WEIGHTS[shape]
    make, formula = MAKERS[kind]
    weight, tensors = noise(*size, seed=0), make(size)
    magnitude = noise(1, size[1], *(1,) * (len(size) - 2), seed=7).abs() + 1
    turned = weight.double() + 2.5 * formula({n: t.double() for n, t in tensors.items()}).reshape(size)
    axes = [axis for axis in range(len(size)) if axis != 1]
    norms = turned.square().sum(axes, keepdim=True).sqrt() + torch.finfo(torch.float32).eps
    complete = turned * magnitude.double() / norms
    change = decomposed(read(tensors, 2.5, size), "dora_scale", magnitude, size)
    for strength in (1.0, 0.7):
        expected = weight.double() + strength * (complete - weight.double())
        actual = weight + change.change(weight, strength)
        assert error(actual, expected) < 1e-6
        # without its normalization, or with norms of rows, the result is another one
        assert error(actual, weight.double() + strength * (turned - weight.double())) > 1e-2


def test_dora_of_peft_has_one_norm_per_output() -> None:
    """PEFT's layer as oracle: the same factors and magnitude in a LoraConfig with use_dora."""
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingTypeStubs]

    for shape in ((24, 20), (12, 8, 3, 3)):
        layer = torch.nn.Linear(20, 24) if len(shape) == 2 else torch.nn.Conv2d(8, 12, 3)
        weight = layer.weight.data.clone()
        config = LoraConfig(r=3, lora_alpha=5, target_modules=["0"], use_dora=True)
        model: Any = get_peft_model(torch.nn.Sequential(layer), config)  # pyright: ignore[reportArgumentType]
        peft = model.base_model.model[0]
        tensors = pair(shape)
        peft.lora_A["default"].weight.data = tensors["lora_down.weight"]
        peft.lora_B["default"].weight.data = tensors["lora_up.weight"]
        magnitude = peft.lora_magnitude_vector["default"].weight
        magnitude.data = magnitude.data * 1.3
        assert magnitude_fits("lora_magnitude_vector", tuple(magnitude.shape), shape)
        change = decomposed(read(tensors, 5.0, shape), "lora_magnitude_vector", magnitude.data, shape)
        model.merge_adapter()
        expected = peft.base_layer.weight.data.double()
        assert error(weight + change.change(weight, 1.0), expected) < 1e-6
        assert error(weight, expected) > 0.1
