"""Joined factors follow every change of the trained tensors."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from spectune.core.low_rank import LowRank
from spectune.model.inject import AdaptedLayer, Form
from spectune.model.joined_factors import JoinedFactors
from spectune.training.optim.groups import build_optimizer
from spectune.training.optim.kinds import OPTIMIZERS

WIDTHS = [(6, 5), (6, 5), (6, 7), (6, 5)]


def adapted(form: Form = "delta") -> list[AdaptedLayer]:
    generator = torch.Generator().manual_seed(0)
    layers: list[AdaptedLayer] = []
    for inside, out in WIDTHS:
        base = nn.Linear(inside, out).requires_grad_(False)
        down, up = torch.randn(2, inside, generator=generator), torch.randn(out, 2, generator=generator)
        layers.append(AdaptedLayer(base, LowRank(down=down, up=up, alpha=1.0), form, torch.float32))
    factors = JoinedFactors(layers)
    for layer in layers:
        layer.joined_factors = factors
    factors.prepare(torch.float32)
    return layers


def expected(layer: AdaptedLayer, x: Tensor) -> Tensor:
    """Return the output by the definition, from the current tensors."""
    A, B = layer.down.detach(), layer.up.detach()
    if layer.form == "delta":
        A0, B0 = layer.frame_down, layer.frame_up
        change = (B0 + B) @ (A0 + A) - B0 @ A0
    else:
        change = B @ A
    return layer.base(x) + layer.scale * x @ change.T


def check(layers: list[AdaptedLayer], dtype: torch.dtype = torch.float32) -> None:
    for layer in layers:
        x = torch.randn(3, layer.base.weight.shape[1], dtype=dtype)
        torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-4, atol=1e-5)


def write_in_place(layers: list[AdaptedLayer]) -> None:
    with torch.no_grad():
        layers[1].up.add_(0.3)


def write_data(layers: list[AdaptedLayer]) -> None:
    layers[1].up.data.add_(0.3)
    layers[0].joined_factors.refresh()


def replace_data(layers: list[AdaptedLayer]) -> None:
    for layer in layers:
        layer.up.data = layer.up.data + 0.3


def cast(layers: list[AdaptedLayer]) -> None:
    for layer in layers:
        layer.double()


def load(layers: list[AdaptedLayer]) -> None:
    write_in_place(layers)
    layers[2].load(layers[2].delta())


CHANGES = [write_in_place, write_data, replace_data, load]


@pytest.mark.parametrize("form", ["delta", "residual"])
@pytest.mark.parametrize("change", CHANGES)
def test_outputs_follow_a_change(change: Callable[[list[AdaptedLayer]], None], form: Form) -> None:
    layers = adapted(form)
    check(layers)
    before = [layer(torch.ones(1, 6)) for layer in layers]
    change(layers)
    check(layers)
    if change is not load:
        assert not torch.equal(layers[1](torch.ones(1, 6)), before[1])


def test_outputs_follow_a_cast() -> None:
    layers = adapted()
    cast(layers)
    check(layers, torch.float64)


def test_outputs_follow_another_frame() -> None:
    layers = adapted()
    layers[0].reframe(LowRank(down=torch.ones(3, 6), up=torch.ones(5, 3), alpha=3.0))
    write_in_place(layers)
    check(layers)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_outputs_follow_a_step_of_every_optimizer(name: str) -> None:
    layers = adapted()
    parameters = [tensor for layer in layers for tensor in (layer.down, layer.up)]
    optimizer = build_optimizer(name, [{"params": parameters, "part": "unet"}])
    optimizer.register_step_post_hook(lambda *_: layers[0].joined_factors.refresh())
    x = torch.randn(4, 6)
    for _ in range(3):
        start = deepcopy([tensor.detach() for tensor in parameters])
        sum(layer(x).square().mean() for layer in layers).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert any(not torch.equal(one, two) for one, two in zip(start, parameters, strict=True))
        check(layers)


def test_a_first_use_in_inference_mode_does_not_break_training() -> None:
    layers = adapted()
    layers[0].joined_versions = None
    with torch.inference_mode():
        layers[0](torch.ones(1, 6, dtype=torch.float64).float())
    layers[0](torch.ones(1, 6)).sum().backward()
    assert layers[0].up.grad is not None


def test_a_change_between_forward_and_backward_is_an_error() -> None:
    layers = adapted()
    out = layers[1](torch.ones(1, 6))
    write_in_place(layers)
    layers[1](torch.ones(1, 6))  # refreshes
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_tensors_of_one_shape_are_adjacent() -> None:
    layers = adapted()
    ups = [layer.up for layer in layers if layer.up.shape == (5, 2)]
    storages = {tensor.untyped_storage().data_ptr() for tensor in ups}
    assert (len(ups), len(storages)) == (3, 1)
    assert len({layer.down.untyped_storage().data_ptr() for layer in layers}) == 1  # all four have one shape
