from __future__ import annotations

import inspect

import pytest
import torch
from prodigyplus import ProdigyPlusScheduleFree

from spectune.train.optim import (
    OPTIMIZERS,
    build_optimizer,
    finished_weights,
    groups_by_part,
    rate_factor,
    step_sizes,
)


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 40), (40, 3))]


def step(optimizer: torch.optim.Optimizer, tensors: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=generator)
    optimizer.step()


def test_our_defaults_are_those_of_prodigy_plus() -> None:
    theirs = inspect.signature(ProdigyPlusScheduleFree.__init__).parameters
    left_out = {"self", "params", "lr", "fused_back_pass"}
    ours = OPTIMIZERS["prodigy_plus_schedule_free"].options().model_dump()
    assert ours == {name: value.default for name, value in theirs.items() if name not in left_out}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_looking_at_the_finished_weights_changes_nothing(name: str) -> None:
    looked, plain = parameters(), parameters()
    optimizers = [build_optimizer(name, [{"params": tensors}]) for tensors in (looked, plain)]
    for seed in range(4):
        step(optimizers[0], looked, seed)
        step(optimizers[1], plain, seed)
        with finished_weights(optimizers[0], looked):
            pass
    assert all(torch.equal(one, two) for one, two in zip(looked, plain, strict=True))


def test_a_schedule_free_optimizer_stands_for_other_weights_than_it_steps_on() -> None:
    tensors = parameters()
    optimizer = build_optimizer(
        "prodigy_plus_schedule_free",
        groups_by_part(dict(zip(("unet.down", "te1.up"), tensors, strict=True))),
        options={"d0": 1e-2},
    )
    for seed in range(3):
        step(optimizer, tensors, seed)
    stepping = [tensor.detach().clone() for tensor in tensors]
    with finished_weights(optimizer, tensors):
        assert not torch.equal(tensors[0], stepping[0])
        with pytest.raises(Exception, match="Not in train mode"):
            optimizer.step()
    assert torch.equal(tensors[0], stepping[0])
    found = step_sizes(optimizer)
    assert list(found) == ["unet", "te1"]
    assert min(found.values()) > 0
    assert all(group["split_groups"] for group in optimizer.param_groups)  # off with a single group


def test_stdout_stays_clean(capsys: pytest.CaptureFixture[str]) -> None:
    tensors = parameters()
    optimizer = build_optimizer(
        "prodigy_plus_schedule_free", [{"params": tensors}], options={"prodigy_steps": 1, "eps": None}
    )
    step(optimizer, tensors, 0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("schedule", "step_", "expected"),
    [
        ("constant", 0, 0.5),
        ("constant", 1, 1.0),
        ("constant", 9, 1.0),
        ("linear", 6, 0.5),
        ("cosine", 6, 0.5),
    ],
)
def test_rates_by_hand(schedule: str, step_: int, expected: float) -> None:
    assert rate_factor(schedule, step_, steps=10, warmup_steps=2) == pytest.approx(expected)
