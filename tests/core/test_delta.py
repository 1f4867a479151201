"""The gradients that are written out are those that autograd finds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spectune.core.delta import Factors, delta_conv, delta_linear, joined_down, joined_up, low_rank

SCALE = 0.5


def factors(out: int, inside: tuple[int, ...], rank: int, dtype: torch.dtype = torch.float64) -> Factors:
    generator = torch.Generator().manual_seed(1)
    ones = (1,) * (len(inside) - 1)
    shapes = [(rank, *inside), (out, rank, *ones)] * 2
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return Factors(*tensors[:2], *(tensor.requires_grad_() for tensor in tensors[2:]))


def plain(x: Tensor, base: nn.Module, four: Factors, *, with_base: bool) -> Tensor:
    """W x + scale*(dB (A0+dA) + B0 dA) x, one product after the other."""
    first = low_rank(x, base, four.frame_down + four.down, four.up)
    second = low_rank(x, base, four.down, four.frame_up)
    change = SCALE * (first + second)
    return base(x) + change if with_base else change


def linear(x: Tensor, four: Factors) -> tuple[Tensor, Tensor]:
    base = nn.Linear(6, 5, dtype=torch.float64).requires_grad_(False)
    return delta_linear(x, base, SCALE, four), plain(x, base, four, with_base=True)


def conv(x: Tensor, four: Factors) -> tuple[Tensor, Tensor]:
    base = nn.Conv2d(4, 5, 3, stride=2, padding=1, dtype=torch.float64).requires_grad_(False)
    return delta_conv(x, base, SCALE, four), plain(x, base, four, with_base=False)


CASES = {
    "linear": (linear, (2, 3, 6), (6,)),
    "conv": (conv, (2, 4, 5, 7), (4, 3, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_plain_autograd(name: str) -> None:
    call, shape, inside = CASES[name]
    four = factors(5, inside, 2)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    ours, theirs = call(x, four)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    wanted = (x, four.down, four.up)
    found, expected = (torch.autograd.grad((out * weights).sum(), wanted) for out in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found[1] * 1.01, expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_for_the_way_back_is_the_input_and_rank_numbers_each(name: str) -> None:
    _, shape, inside = CASES[name]
    four = factors(5, inside, 2)
    x = torch.randn(shape, dtype=torch.float64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        ours = (delta_linear if name == "linear" else delta_conv)(x, _base(name), SCALE, four)
    own = {four.frame_down.data_ptr(), four.frame_up.data_ptr(), four.down.data_ptr(), four.up.data_ptr()}
    hidden = [
        t for t in kept if t.data_ptr() not in own and t.shape != x.shape and not isinstance(t, nn.Parameter)
    ]
    positions = ours.numel() // 5
    assert [tensor.numel() for tensor in hidden] == [positions * 2]


def _base(name: str) -> nn.Module:
    module = nn.Linear(6, 5) if name == "linear" else nn.Conv2d(4, 5, 3, stride=2, padding=1)
    return module.double().requires_grad_(False)


@pytest.mark.parametrize("name", CASES)
def test_bf16_inputs_give_gradients_in_the_type_of_the_trained_tensors(name: str) -> None:
    _, shape, inside = CASES[name]
    four = factors(5, inside, 2, torch.float32)
    base = _base(name).bfloat16()
    call: Callable[..., Tensor] = delta_linear if name == "linear" else delta_conv
    x = torch.randn(shape, dtype=torch.bfloat16).requires_grad_()
    out = call(x, base, 1.0, four)
    out.float().square().mean().backward()
    assert (out.dtype, x.grad.dtype, four.down.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_dropout_leaves_out_directions_as_a_whole() -> None:
    """Both halves of joined factors are cut alike, and what stays is scaled up: the mean is the change."""
    base = nn.Linear(6, 5, dtype=torch.float64).requires_grad_(False)
    four = factors(5, (6,), 1)  # one direction: it is there or it is not
    x = torch.randn(1, 6, dtype=torch.float64).expand(4000, 6)
    down, up = joined_down(four, x.dtype), joined_up(four, 1.0, x.dtype)
    whole = low_rank(x[:1], base, down, up)
    torch.manual_seed(0)
    cut = low_rank(x, base, down, up, dropout=0.25, halves=2)
    gone = (cut == 0).all(dim=1)
    torch.testing.assert_close(cut[~gone], (whole / 0.75).expand_as(cut[~gone]), rtol=1e-12, atol=1e-12)
    assert abs(float(gone.double().mean()) - 0.25) < 0.03


@pytest.mark.parametrize("name", CASES)
def test_it_compiles_as_one_graph(name: str) -> None:
    _, shape, inside = CASES[name]
    four, base = factors(5, inside, 2), _base(name)
    call: Callable[..., Tensor] = delta_linear if name == "linear" else delta_conv
    x = torch.randn(shape, dtype=torch.float64)

    def cost() -> Tensor:
        return call(x, base, SCALE, four).square().sum()

    expected = torch.autograd.grad(cost(), (four.down, four.up))
    compiled = torch.compile(cost, backend="aot_eager", fullgraph=True)
    for one, other in zip(torch.autograd.grad(compiled(), (four.down, four.up)), expected, strict=True):
        torch.testing.assert_close(one, other)
