"""Optimizers on stacks of tensors: the library's results in a fraction of its kernel launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import dadaptation
import lion_pytorch
import prodigyopt
import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from torch import Tensor, nn
from torch.optim import Optimizer

from spectune.files.source import TensorInfo
from spectune.training.optim.adafactor import Adafactor, PacedAdafactor
from spectune.training.optim.eight_bit import PlainStateAdamW8bit
from spectune.training.optim.groups import build_optimizer, groups_by_part
from spectune.training.optim.prodigy import StackedProdigy
from spectune.training.optim.stacks import StackedOptimizer, most_members, stacked_class
from spectune.training.state import _restore_dtypes
from tests.launches import Launches
from tests.training.optim.adjacent import adjacent, small_sdxl, tensors, train, two_groups

Lion, DAdaptAdam, Prodigy = lion_pytorch.Lion, dadaptation.DAdaptAdam, prodigyopt.Prodigy
# Adafactor and Lion otherwise set their own rates; the others need a start that is not too small.
RATED, SMALL = {"lr": 1e-2}, {"lr": 1.0, "d0": 1e-3}
FIXED = {**RATED, "relative_step": False, "scale_parameter": False}
CASES: dict[str, tuple[type[Optimizer], type[Optimizer], dict[str, Any]]] = {
    "lion": (stacked_class(Lion), Lion, RATED),
    "lion, decay": (
        stacked_class(Lion),
        Lion,
        {**RATED, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    "dadapt": (stacked_class(DAdaptAdam), DAdaptAdam, SMALL),
    "dadapt, decay": (stacked_class(DAdaptAdam), DAdaptAdam, {**SMALL, "weight_decay": 0.1}),
    "prodigy": (StackedProdigy, Prodigy, SMALL),
    "prodigy, slices": (StackedProdigy, Prodigy, {**SMALL, "slice_p": 11}),
    "prodigy, decay": (StackedProdigy, Prodigy, {**SMALL, "weight_decay": 0.1, "growth_rate": 1.05}),
    "prodigy, coupled": (StackedProdigy, Prodigy, {**SMALL, "weight_decay": 0.1, "decouple": False}),
    "prodigy, corrected": (
        StackedProdigy,
        Prodigy,
        {**SMALL, "use_bias_correction": True, "safeguard_warmup": True, "beta3": 0.9, "d_coef": 2.0},
    ),
    "prodigy, no momentum": (StackedProdigy, Prodigy, {**SMALL, "betas": (0.0, 0.99)}),
    "adafactor": (PacedAdafactor, Adafactor, FIXED),
    "adafactor, momentum": (PacedAdafactor, Adafactor, {**FIXED, "beta1": 0.9, "weight_decay": 0.1}),
    "adafactor, scaled": (PacedAdafactor, Adafactor, {**FIXED, "scale_parameter": True, "weight_decay": 0.1}),
}
COMMON = {"lion": "lion", "dadapt": "dadapt_adam", "prodigy": "prodigy", "adafactor": "adafactor"}


def distance(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return the norm of the difference of all tensors."""
    with torch.no_grad():
        return sum((p - q).square().sum().item() for p, q in zip(some, others, strict=True)) ** 0.5


@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_50_steps_equal_the_librarys(name: str, start: float) -> None:
    ours_class, library_class, options = CASES[name]
    ours, theirs = tensors(start=start), tensors(start=start)
    one, other = ours_class(two_groups(ours), **options), library_class(two_groups(theirs), **options)
    for optimizer, parameters in ((one, ours), (other, theirs)):
        train(optimizer, parameters, range(50), frozen=4, pull=0.3)
    assert isinstance(one, StackedOptimizer)
    moved, error = distance(tensors(start=start), theirs), distance(ours, theirs)
    assert error < 1e-6 * moved
    for group, same in zip(one.param_groups, other.param_groups, strict=True):
        assert group.get("d", 0) == pytest.approx(same.get("d", 0), rel=1e-6)
        assert group.get("k") == same.get("k")


@pytest.mark.parametrize("name", CASES)
def test_the_saved_state_has_the_librarys_format(name: str) -> None:
    ours_class, library_class, options = CASES[name]
    ours, theirs = tensors(), tensors()
    one, other = ours_class(two_groups(ours), **options), library_class(two_groups(theirs), **options)
    for optimizer, parameters in ((one, ours), (other, theirs)):
        train(optimizer, parameters, range(5), pull=0.0)
    saved, expected = one.state_dict(), other.state_dict()
    assert saved["param_groups"][0].keys() == {*expected["param_groups"][0]}
    for index, state in expected["state"].items():
        assert saved["state"][index].keys() == state.keys()
        for key, value in state.items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(saved["state"][index][key], value, rtol=1e-5, atol=1e-6)
            else:
                assert saved["state"][index][key] == value
    # a state that the library saved continues on stacks
    loaded = tensors()
    for p, q in zip(loaded, theirs, strict=True):
        p.data.copy_(q.data)
    third = ours_class(two_groups(loaded), **options)
    third.load_state_dict(deepcopy(expected))
    _restore_dtypes(third, expected["state"])
    for optimizer, parameters in ((third, loaded), (other, theirs)):
        train(optimizer, parameters, range(5, 10), pull=0.0)
    assert distance(loaded, theirs) < 1e-6 * distance(tensors(), theirs)


@pytest.mark.parametrize("name", COMMON)
def test_a_loaded_state_continues_bit_for_bit(name: str) -> None:
    ours_class, _, options = CASES[name]
    whole = tensors()
    optimizer = ours_class(two_groups(whole), **options)
    train(optimizer, whole, range(5))
    saved = deepcopy(optimizer.state_dict())
    parts = adjacent([nn.Parameter(p.detach().clone()) for p in whole])
    second = ours_class(two_groups(parts), **options)
    second.load_state_dict(saved)
    train(optimizer, whole, range(5, 10)), train(second, parts, range(5, 10))
    assert all(torch.equal(p, q) for p, q in zip(whole, parts, strict=True))


def test_8_bit_steps_equal_the_librarys() -> None:
    """Tensors of whole blocks are stacked; small ones and those that end within a block are not."""
    shapes = [(8, 640), (640, 8), (8, 640), (8, 640), (8, 20), (8, 20), (12, 341), (12, 341)]
    both = [adjacent([nn.Parameter(torch.ones(shape)) for shape in shapes]) for _ in range(2)]
    ours, theirs = both
    one, other = PlainStateAdamW8bit(ours, lr=1e-2), AdamW8bit(theirs, lr=1e-2)
    for optimizer, parameters in ((one, ours), (other, theirs)):
        train(optimizer, parameters, range(20))
    assert [len(members) for members in one._members.values()] == [3, 1, 1, 1, 1, 1]
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    saved, expected = one.state_dict()["state"], Optimizer.state_dict(other)["state"]
    for index, state in expected.items():
        assert saved[index].keys() == state.keys()
        assert all(
            torch.equal(torch.as_tensor(saved[index][k]), torch.as_tensor(v)) for k, v in state.items()
        )


def test_gradients_are_stored_once() -> None:
    parameters = tensors()
    optimizer = build_optimizer("lion", two_groups(parameters))
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    storages = {p.grad.untyped_storage().data_ptr() for p in parameters if p.grad is not None}
    assert len(storages) == 7  # shapes of both groups
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in parameters if p.grad is not None)


def test_stacks_have_at_most_64_mib() -> None:
    like = torch.empty(64, 1280, device="meta")
    assert most_members(like) == 204
    assert most_members(torch.empty(64, 1280, 1024, device="meta")) == 1


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("adamw", 100),
        ("adamw_schedule_free", 270),
        ("lion", 400),
        ("dadapt_adam", 800),
        ("prodigy", 700),
        ("adafactor", 1100),
        ("prodigy_plus_schedule_free", 1750),
    ],
)
def test_launches_of_a_step_of_sdxl(
    name: str, most: int, full_infos: Mapping[str, TensorInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = small_sdxl(full_infos, monkeypatch)
    assert len(parameters) == 2104
    optimizer = build_optimizer(name, groups_by_part(parameters))
    counts: list[Launches] = []
    for _ in range(2):
        for p in parameters.values():
            p.grad = torch.ones_like(p)
        with Launches() as launches:
            optimizer.step()
        counts.append(launches)
    second = counts[1]  # the first step makes the state
    assert 50 < second.total <= most, (second.total, second.by_name.most_common(12))
