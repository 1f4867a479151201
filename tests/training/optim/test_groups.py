from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from spectune.errors import InputError
from spectune.training.optim.groups import build_optimizer, groups_by_part, learning_rates, step_sizes
from spectune.training.optim.kinds import OPTIMIZERS, check_options, traits_of
from tests.training.optim.deltas import set_random_gradients, trained

ESTIMATING = ["dadapt_adam", "prodigy", "prodigy_plus_schedule_free"]


def test_parts_have_their_own_learning_rates() -> None:
    tensors = trained()
    optimizer = build_optimizer(
        "adamw", groups_by_part(tensors), learning_rate=0.5, part_learning_rates={"te1": 0.125}
    )
    assert learning_rates(optimizer) == {"unet": 0.5, "te1": 0.125}
    for tensor in tensors.values():
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    values = {key: value.detach().mean().item() for key, value in tensors.items()}
    assert values == pytest.approx({"unet.a.down": -0.5, "unet.a.up": -0.5, "te1.b.down": -0.125})


def test_groups_follow_the_order_of_the_tensors() -> None:
    tensors = trained()
    groups = groups_by_part(tensors)
    assert [group["part"] for group in groups] == ["unet", "te1"]
    assert groups[1]["params"][0] is tensors["te1.b.down"]
    build_optimizer("adamw", groups)
    assert all(set(group) == {"params", "part"} for group in groups)  # the caller's groups are unchanged


def test_a_learning_rate_for_a_part_that_is_not_trained_is_refused() -> None:
    with pytest.raises(InputError, match="part_learning_rates names te2, but this part is not trained"):
        build_optimizer("adamw", groups_by_part(trained()), part_learning_rates={"te2": 1e-4})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_default_learning_rate_of_each_optimizer(name: str) -> None:
    kind = OPTIMIZERS[name]
    assert set(learning_rates(build_optimizer(name, groups_by_part(trained()))).values()) == {
        kind.learning_rate
    }
    assert kind.fixed_learning_rate in (None, kind.learning_rate)


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in ESTIMATING), ("adafactor", {"relative_step": True})]
)
def test_optimizers_with_their_own_step_size_refuse_other_learning_rates(
    name: str, options: dict[str, Any]
) -> None:
    assert traits_of(name, check_options(name, options)).fixed_learning_rate == 1.0
    with pytest.raises(
        InputError, match=f"{name} computes its own step size and needs a learning rate of 1, got 0.1"
    ):
        build_optimizer(name, groups_by_part(trained()), learning_rate=0.1, options=options)
    with pytest.raises(InputError, match="computes its own step size and needs"):
        build_optimizer(name, groups_by_part(trained()), part_learning_rates={"te1": 0.1}, options=options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_estimated_step_sizes_are_reported_for_each_part(name: str) -> None:
    tensors = trained()
    optimizer = build_optimizer(name, groups_by_part(tensors))
    if name not in ESTIMATING:
        assert step_sizes(optimizer) == {}
        return
    assert step_sizes(optimizer) == {"unet": 1e-6, "te1": 1e-6}
    for _ in range(10):
        for tensor in tensors.values():
            tensor.grad = torch.ones_like(tensor)
        optimizer.step()
    estimates = step_sizes(optimizer)
    assert list(estimates) == ["unet", "te1"]
    assert min(estimates.values()) > 1.5e-6


@pytest.mark.parametrize("name", ["dadapt_adam", "prodigy"])
@pytest.mark.parametrize("growth_rate", [None, 1.25])
def test_growth_rate_limits_the_estimate(name: str, growth_rate: float | None) -> None:
    tensors = trained()
    optimizer = build_optimizer(name, groups_by_part(tensors), options={"growth_rate": growth_rate})
    estimates = [step_sizes(optimizer)["unet"]]
    for _ in range(8):
        for tensor in tensors.values():
            tensor.grad = torch.ones_like(tensor)
        optimizer.step()
        estimates.append(step_sizes(optimizer)["unet"])
    # Prodigy's first estimate replaces d0 and is not limited.
    fastest = max(after / before for before, after in pairwise(estimates) if before > 1e-6)
    if growth_rate is None:
        assert fastest > 1.5
    else:
        assert fastest == pytest.approx(growth_rate)


def test_prodigy_plus_estimates_each_part_separately() -> None:
    optimizer = build_optimizer("prodigy_plus_schedule_free", groups_by_part(trained()))
    assert all(group["split_groups"] for group in optimizer.param_groups)  # off with a single group


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accelerate_keeps_the_parts(name: str) -> None:
    tensors = trained()
    optimizer = build_optimizer(name, groups_by_part(tensors))
    prepared = Accelerator(cpu=True).prepare_optimizer(optimizer, device_placement=True)
    set_random_gradients(tensors, 0)
    prepared.step()
    assert list(learning_rates(optimizer)) == ["unet", "te1"]
    assert all(tensor.detach().any() for tensor in tensors.values())
