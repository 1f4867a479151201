from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectune.training.optim.groups import build_optimizer, groups_by_part, learning_rates
from spectune.training.optim.kinds import OPTIMIZERS
from spectune.training.optim.modes import finished_weights
from tests.training.optim.deltas import advance, set_random_gradients, trained


def one_step(name: str, gradient: Tensor, **arguments: Any) -> Tensor:
    """Return the values of a zero tensor after one step."""
    parameter = nn.Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient.clone()
    build_optimizer(name, [{"params": [parameter], "part": "unet"}], **arguments).step()
    return parameter.detach()


# learning rates and options for optimizers whose defaults need more than 30 steps
FASTER: dict[str, tuple[float | None, dict[str, Any]]] = {
    "adamw": (1e-2, {}),
    "adamw8bit": (1e-2, {}),
    "adafactor": (1e-2, {}),
    "lion": (1e-2, {}),
    "adamw_schedule_free": (3e-2, {}),
    "dadapt_adam": (None, {"d0": 1e-3}),
    "prodigy_plus_schedule_free": (None, {"d0": 1e-2}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_thirty_steps_lower_the_loss(name: str) -> None:
    rate, options = FASTER.get(name, (None, {}))
    tensors = trained()
    generator = torch.Generator().manual_seed(1)
    targets = {key: 0.1 * torch.randn(value.shape, generator=generator) for key, value in tensors.items()}
    optimizer = build_optimizer(name, groups_by_part(tensors), learning_rate=rate, options=options)

    def loss() -> Tensor:
        return torch.stack([(tensors[key] - targets[key]).square().sum() for key in tensors]).sum()

    before = loss().item()
    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    with finished_weights(optimizer, list(tensors.values())):
        assert loss().item() < 0.5 * before


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # All use the sign of the gradient in the first step.
        ("adamw", {}, -0.5),
        ("adamw8bit", {}, -0.5),
        ("lion", {}, -0.5),
        ("adafactor", {}, -0.5),
        ("adafactor", {"scale_parameter": True}, -0.5 * 1e-3),  # times the smallest size of a parameter
        # The average of one step is the step.
        ("adamw_schedule_free", {}, -0.5),
        ("adamw_schedule_free", {"warmup_steps": 4}, -0.5 / 4),
    ],
)
def test_the_first_step_by_hand(name: str, options: dict[str, Any], expected: float) -> None:
    gradient = torch.full((64, 80), 0.25)
    gradient[:, ::2] = -4.0
    values = one_step(name, gradient, learning_rate=0.5, options=options)
    torch.testing.assert_close(values, expected * gradient.sign(), rtol=1e-5, atol=0)


def test_the_relative_steps_of_adafactor_follow_the_schedule() -> None:
    parameter = nn.Parameter(torch.zeros(3, 4))
    options = {"relative_step": True}
    optimizer = build_optimizer("adafactor", [{"params": [parameter], "part": "unet"}], options=options)
    assert learning_rates(optimizer) == {"unet": 1.0}
    parameter.grad = torch.ones(3, 4)
    optimizer.step()
    assert parameter.detach().max().item() == pytest.approx(-0.01)  # min(0.01, 1 / sqrt(1))
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    assert parameter.detach().max().item() == pytest.approx(-0.0125)


def test_only_large_tensors_have_8_bit_moments() -> None:
    small, large = nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.zeros(64, 80))
    optimizer = build_optimizer("adamw8bit", [{"params": [small, large]}])
    for parameter in (small, large):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state_dict()["state"]
    assert [state[index]["state1"].dtype for index in (0, 1)] == [torch.float32, torch.uint8]


@pytest.mark.parametrize(
    ("name", "bytes_per_number"),
    [
        ("adamw", 4 + 4),
        ("adamw8bit", 1 + 1 + 2 * 4 / 256),  # a scale for each block of 256
        ("adafactor", 4 * (64 + 80) / (64 * 80)),  # rows and columns
        ("lion", 4),
        ("dadapt_adam", 4 + 4 + 4),
        ("prodigy", 4 + 4 + 4),  # the initial values are a single zero
        ("adamw_schedule_free", 4 + 4),
        (
            "prodigy_plus_schedule_free",
            4 + 2 * 466 / (64 * 80) + 4 * (64 + 80) / (64 * 80),
        ),  # every 11th, bf16
    ],
)
def test_state_sizes_are_those_of_the_docs(name: str, bytes_per_number: float) -> None:
    tensors = trained()
    optimizer = build_optimizer(name, groups_by_part(tensors))
    advance(optimizer, tensors, range(2))
    state_bytes = sum(
        value.numel() * value.element_size()
        for state in optimizer.state_dict()["state"].values()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.ndim and not key.startswith("qmap")
    )
    assert state_bytes == pytest.approx(bytes_per_number * sum(tensor.numel() for tensor in tensors.values()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_tensor_without_a_gradient_is_unchanged_and_can_get_one_later(name: str) -> None:
    """The output of the last layer of the first text encoder is not used, so it gets no gradient."""
    tensors = trained()
    optimizer = build_optimizer(name, groups_by_part(tensors))
    set_random_gradients(tensors, 0)
    tensors["te1.b.down"].grad = None
    optimizer.step()
    assert not tensors["te1.b.down"].detach().any()
    advance(optimizer, tensors, range(1, 3))
    assert tensors["te1.b.down"].detach().any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_print_nothing_to_stdout(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    printing = {"eps": None, "prodigy_steps": 1} if name == "prodigy_plus_schedule_free" else {}
    decoupled = {"decouple": True} if name in ("dadapt_adam", "prodigy") else {}
    tensors = trained()
    optimizer = build_optimizer(
        name, groups_by_part(tensors), options={"weight_decay": 0.01, **printing, **decoupled}
    )
    advance(optimizer, tensors, range(1))
    captured = capsys.readouterr()
    assert captured.out == ""
    if decoupled or printing:
        assert captured.err  # the optimizer did print something
