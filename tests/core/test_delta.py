"""The delta formula, its stacked factors, and the gradients written out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spectune.core.delta import (
    Delta,
    Factors,
    Joined,
    added_to_base,
    added_to_residual,
    apply_low_rank,
    change,
    delta_between,
    delta_conv,
    delta_linear,
    join_delta,
    join_residual,
    stacked_down,
    stacked_up,
)
from spectune.core.low_rank import LowRank, product, to_factors

SCALE = 0.5
side = st.integers(1, 12)
kernel = st.sampled_from([1, 3])
shapes = st.one_of(st.tuples(side, side), st.tuples(side, side, kernel, kernel))


def random_delta(shape: tuple[int, ...], rank: int, scale: float) -> Delta:
    generator = torch.Generator().manual_seed(1)
    columns = int(torch.tensor(shape[1:]).prod())
    pairs = [
        to_factors(
            torch.randn(shape[0], rank, generator=generator),
            torch.randn(rank, columns, generator=generator),
            shape,
        )
        for _ in range(2)
    ]
    (up, down), (moved_up, moved_down) = pairs
    frame = LowRank(down=down, up=up, alpha=scale * rank)
    return Delta(frame=frame, down=moved_down * 0.01, up=moved_up * 0.01)


@given(shapes, st.integers(1, 4), st.sampled_from([1.0, 0.5]))
@settings(deadline=None, max_examples=50)
def test_the_change_is_the_tuned_product_minus_the_product_of_the_frame(
    shape: tuple[int, ...], rank: int, scale: float
) -> None:
    delta = random_delta(shape, rank, scale)
    expected = product(added_to_residual(delta)) - product(delta.frame)
    assert added_to_base(delta).scale == pytest.approx(scale)
    assert added_to_base(delta).rank == 2 * rank
    torch.testing.assert_close(change(delta), expected, rtol=1e-4, atol=1e-5)
    off = Delta(delta.frame, down=delta.down * 1.01, up=delta.up)
    if expected.abs().max() > 0.1:
        assert not torch.allclose(change(off), expected, rtol=1e-4, atol=1e-5)


def test_a_change_of_zero_is_exactly_zero() -> None:
    frame = random_delta((7, 5, 3, 3), 4, 1.0).frame
    delta = Delta(frame=frame, down=torch.zeros_like(frame.down), up=torch.zeros_like(frame.up))
    assert not change(delta).any()


def test_a_low_rank_layer_is_added_unchanged() -> None:
    layer = random_delta((7, 5), 2, 1.0).frame
    assert added_to_base(layer) is layer
    assert added_to_residual(layer) is layer


def test_the_delta_between_a_frame_and_its_tuned_factors_is_the_delta() -> None:
    delta = random_delta((7, 5, 3, 3), 4, SCALE)
    tensors = (delta.frame.down, delta.frame.up, delta.down, delta.up)
    A0, B0, dA, dB = ((4096 * tensor).round() / 4096 for tensor in tensors)  # sums are exact in float32
    frame = LowRank(down=A0, up=B0, alpha=delta.frame.alpha)
    again = delta_between(frame, added_to_residual(Delta(frame, dA, dB)))
    assert torch.equal(again.down, dA)
    assert torch.equal(again.up, dB)


def factors(out: int, inside: tuple[int, ...], rank: int, dtype: torch.dtype = torch.float64) -> Factors:
    generator = torch.Generator().manual_seed(1)
    ones = (1,) * (len(inside) - 1)
    shapes = [(rank, *inside), (out, rank, *ones)] * 2
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return Factors(*tensors[:2], *(tensor.requires_grad_() for tensor in tensors[2:]))


def joined(four: Factors, scale: float, dtype: torch.dtype) -> Joined:
    """Return the joined factors of one layer."""
    out, rank = four.dB.shape[:2]
    down = torch.empty((1, 2 * rank, *four.dA.shape[1:]), dtype=dtype)
    up = torch.empty((1, out, 3 * rank), dtype=dtype)
    join_delta(down, up, Factors(*(tensor.detach()[None] for tensor in four)), scale)
    return Joined.of(down[0], up[0])


def with_change(x: Tensor, base: nn.Module, scale: float, four: Factors) -> Tensor:
    """Return W x with the change of a linear layer, or the change alone of a convolution."""
    call: Callable[..., Tensor] = delta_linear if isinstance(base, nn.Linear) else delta_conv
    return call(x, base, scale, joined(four, scale, x.dtype), (four.dA, four.dB))


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("inside", [(6,), (4, 3, 3)])
def test_joined_factors_are_the_stacked_ones_rounded_once(scale: float, inside: tuple[int, ...]) -> None:
    four = factors(5, inside, 2, torch.float32)
    exact, rounded = joined(four, scale, torch.float32), joined(four, scale, torch.bfloat16)
    assert torch.equal(exact.down, stacked_down(four, torch.float32))
    torch.testing.assert_close(exact.up[:, :4], stacked_up(four, scale, torch.float32).flatten(1))
    torch.testing.assert_close(exact.up[:, 4:], scale * (four.B0 + four.dB).flatten(1))
    assert torch.equal(rounded.down, exact.down.bfloat16())
    assert torch.equal(rounded.up, exact.up.bfloat16())
    assert torch.equal(exact.down_T, exact.down.flatten(1).T)
    assert torch.equal(exact.up_T, exact.up[:, :4].T)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("name", ["linear", "conv"])
def test_the_residual_form_matches_plain_autograd(name: str, scale: float) -> None:
    _, shape, inside = CASES[name]
    four, base = factors(5, inside, 2), _base(name)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    down, up = (torch.empty_like(t.detach()) for t in (four.dA, four.dB.flatten(1)))
    join_residual(down[None], up[None], four.dA.detach()[None], four.dB.detach()[None], scale)
    call: Callable[..., Tensor] = delta_linear if name == "linear" else delta_conv
    ours = call(x, base, scale, Joined.of(down, up), (four.dA, four.dB))
    theirs = scale * apply_low_rank(x, base, four.dA, four.dB)
    theirs = theirs + base(x) if name == "linear" else theirs
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    inputs = (x, four.dA, four.dB)
    actual, expected = (torch.autograd.grad(out.square().sum(), inputs) for out in (ours, theirs))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def reference(x: Tensor, base: nn.Module, four: Factors, *, with_base: bool) -> Tensor:
    """Return W x + scale*(dB (A0+dA) + B0 dA) x by plain autograd, one product after the other."""
    first = apply_low_rank(x, base, four.A0 + four.dA, four.dB)
    second = apply_low_rank(x, base, four.dA, four.B0)
    change = SCALE * (first + second)
    return base(x) + change if with_base else change


def linear(x: Tensor, four: Factors) -> tuple[Tensor, Tensor]:
    base = nn.Linear(6, 5, dtype=torch.float64).requires_grad_(False)
    return with_change(x, base, SCALE, four), reference(x, base, four, with_base=True)


def conv(x: Tensor, four: Factors) -> tuple[Tensor, Tensor]:
    base = nn.Conv2d(4, 5, 3, stride=2, padding=1, dtype=torch.float64).requires_grad_(False)
    return with_change(x, base, SCALE, four), reference(x, base, four, with_base=False)


CASES = {
    "linear": (linear, (2, 3, 6), (6,)),
    "conv": (conv, (2, 4, 5, 7), (4, 3, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_match_plain_autograd(name: str) -> None:
    call, shape, inside = CASES[name]
    four = factors(5, inside, 2)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    ours, theirs = call(x, four)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    inputs = (x, four.dA, four.dB)
    actual, expected = (torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, theirs))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(actual[1] * 1.01, expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_backward_pass_keeps_only_the_input_and_two_values_per_direction(name: str) -> None:
    _, shape, inside = CASES[name]
    four = factors(5, inside, 2)
    x = torch.randn(shape, dtype=torch.float64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        base = _base(name)
        ours = with_change(x, base, SCALE, four)
    factors_and_weights = {tuple(joined(four, SCALE, x.dtype).down.shape), (5, 6), tuple(base.weight.shape)}
    hidden = [t for t in kept if t.shape != x.shape and tuple(t.shape) not in factors_and_weights]
    positions = ours.numel() // 5
    assert [tensor.numel() for tensor in hidden] == [positions * 4]


def _base(name: str) -> nn.Module:
    module = nn.Linear(6, 5) if name == "linear" else nn.Conv2d(4, 5, 3, stride=2, padding=1)
    return module.double().requires_grad_(False)


@pytest.mark.parametrize("name", CASES)
def test_bf16_inputs_give_gradients_in_the_dtype_of_the_trained_tensors(name: str) -> None:
    _, shape, inside = CASES[name]
    four = factors(5, inside, 2, torch.float32)
    base = _base(name).bfloat16()
    x = torch.randn(shape, dtype=torch.bfloat16).requires_grad_()
    out = with_change(x, base, 1.0, four)
    out.float().square().mean().backward()
    assert (out.dtype, x.grad.dtype, four.dA.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_dropout_drops_whole_directions() -> None:
    """Both halves of the stacked factors drop the same directions, and the mean stays the change."""
    base = nn.Linear(6, 5, dtype=torch.float64).requires_grad_(False)
    four = factors(5, (6,), 1)  # one direction, so that a position has all of the change or none
    x = torch.randn(1, 6, dtype=torch.float64).expand(4000, 6)
    down, up = stacked_down(four, x.dtype), stacked_up(four, 1.0, x.dtype)
    whole = apply_low_rank(x[:1], base, down, up)
    torch.manual_seed(0)
    dropped = apply_low_rank(x, base, down, up, dropout=0.25, halves=2)
    gone = (dropped == 0).all(dim=1)
    kept = dropped[~gone]
    torch.testing.assert_close(kept, (whole / 0.75).expand_as(kept), rtol=1e-12, atol=1e-12)
    assert abs(float(gone.double().mean()) - 0.25) < 0.03


@pytest.mark.parametrize("name", CASES)
def test_it_compiles_as_one_graph(name: str) -> None:
    _, shape, inside = CASES[name]
    four, base = factors(5, inside, 2), _base(name)
    call: Callable[..., Tensor] = delta_linear if name == "linear" else delta_conv
    both = joined(four, SCALE, torch.float64)
    x = torch.randn(shape, dtype=torch.float64)

    def cost() -> Tensor:
        return call(x, base, SCALE, both, (four.dA, four.dB)).square().sum()

    expected = torch.autograd.grad(cost(), (four.dA, four.dB))
    compiled = torch.compile(cost, backend="aot_eager", fullgraph=True)
    for one, other in zip(torch.autograd.grad(compiled(), (four.dA, four.dB)), expected, strict=True):
        torch.testing.assert_close(one, other)
