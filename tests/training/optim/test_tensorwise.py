"""Steps on one tensor at a time, in the backward pass and after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectune.core.rounding import round_stochastically
from spectune.training.optim.groups import build_optimizer
from spectune.training.optim.kinds import OPTIMIZERS
from spectune.training.optim.tensorwise import TensorSteps

TENSORWISE = [name for name, kind in OPTIMIZERS.items() if kind.tensorwise]


def small(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(2)
    return {
        f"unet.{index}": nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for index, shape in enumerate([(64, 64), (64, 64), (64,)])
    }


def trained(name: str, dtype: torch.dtype, steps: int, *, in_backward: bool) -> tuple[Any, Optimizer]:
    parameters = small(dtype)
    optimizer = build_optimizer(name, [{"params": list(parameters.values()), "part": "unet"}])
    by_tensor = TensorSteps(optimizer, parameters, seed=3, in_backward=in_backward)
    for step in range(steps):
        x = torch.randn((8, 64), generator=torch.Generator().manual_seed(step)).to(dtype)
        by_tensor.begin(step)
        first, second, bias = parameters.values()
        (torch.tanh(x @ first) @ second + bias).square().mean().backward()
        if not in_backward:
            assert first.grad is not None
            by_tensor.step_all()
        assert all(parameter.grad is None for parameter in parameters.values())
    return parameters, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TENSORWISE)
def test_both_ways_give_the_same_bits_and_the_library_gives_the_same_numbers(
    name: str, dtype: torch.dtype
) -> None:
    one, optimizer = trained(name, dtype, 3, in_backward=True)
    other, _ = trained(name, dtype, 3, in_backward=False)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert all(not torch.equal(one[key], before) for key, before in small(dtype).items())
    assert len(optimizer.state_dict()["state"]) == 3
    if dtype == torch.bfloat16:
        return
    parameters = small(dtype)
    library = build_optimizer(name, [{"params": list(parameters.values()), "part": "unet"}])
    for step in range(3):
        x = torch.randn((8, 64), generator=torch.Generator().manual_seed(step))
        first, second, bias = parameters.values()
        (torch.tanh(x @ first) @ second + bias).square().mean().backward()
        library.step()
        library.zero_grad()
    for key in one:
        torch.testing.assert_close(one[key], parameters[key], rtol=1e-6, atol=1e-7)


def test_the_norm_is_that_of_all_gradients() -> None:
    parameters = small(torch.float32)
    optimizer = build_optimizer("adamw", [{"params": list(parameters.values()), "part": "unet"}])
    steps = TensorSteps(optimizer, parameters, seed=0, in_backward=True)
    steps.begin(0)
    sum((p * p).sum() for p in small(torch.float32).values())
    total = torch.cat([p.detach().flatten() for p in parameters.values()]).norm()
    torch.stack([(p * p).sum() / 2 for p in parameters.values()]).sum().backward()
    assert float(steps.norm()) == pytest.approx(float(total), rel=1e-6)


def test_stochastic_rounding_keeps_the_mean_and_exact_values() -> None:
    exact = torch.full((100_000,), 1 + 2.0**-9)  # a quarter of the way to the next bf16
    rounded = round_stochastically(exact, torch.Generator().manual_seed(0))
    assert set(rounded.tolist()) == {1.0, 1 + 2.0**-7}
    share = float((rounded > 1).float().mean())
    assert share == pytest.approx(0.25, abs=0.01)
    assert torch.equal(rounded, round_stochastically(exact, torch.Generator().manual_seed(0)))
    other = round_stochastically(exact, torch.Generator().manual_seed(1))
    assert not torch.equal(rounded, other)
    values = torch.tensor([0.0, -1.5, float("inf"), -float("inf"), 2.0**-130])
    kept: Tensor = round_stochastically(values, torch.Generator().manual_seed(0))
    assert torch.equal(kept.float(), values)
