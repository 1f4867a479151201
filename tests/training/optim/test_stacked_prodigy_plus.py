"""ProdigyPlus on stacks of tensors: the library's results in a fraction of its kernel launches."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from prodigyplus import ProdigyPlusScheduleFree
from torch import Tensor, nn

from spectune.training.optim.stacked_prodigy_plus import StackedProdigyPlus
from spectune.training.state import _restore_dtypes
from tests.training.optim.adjacent import SHAPES, adjacent, tensors, train, two_groups

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "not factored": {"factored": False},
    "atan2": {"eps": None},
    "no clipping": {"use_stableadamw": False},
    "decay": {"weight_decay": 0.01},
    "decay without rate": {"weight_decay": 0.01, "weight_decay_by_lr": False},
    "bias correction": {"use_bias_correction": True},
    "one d": {"split_groups": False},
    "mean d": {"split_groups_mean": True},
    "frozen d": {"prodigy_steps": 10},
    "no averaging": {"use_schedulefree": False},
    "averaging strength": {"schedulefree_c": 8},
    "adopt": {"use_adopt": True},
    "grams": {"use_grams": True},
    "focus": {"use_focus": True, "factored": False},
    "speed": {"use_speed": True},
    "cautious": {"use_cautious": True},
    "orthograd": {"use_orthograd": True},
}


def optimizer_of(cls: type, parameters: list[nn.Parameter], **options: Any) -> Any:
    return cls(two_groups(parameters), lr=1.0, d0=1e-4, **options)


@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("name", OPTIONS)
def test_50_steps_equal_the_librarys(name: str, start: float, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = tensors(start=start), tensors(start=start)
    one = optimizer_of(StackedProdigyPlus, ours, **OPTIONS[name])
    other = optimizer_of(ProdigyPlusScheduleFree, theirs, **OPTIONS[name])
    begun = [p.detach().clone() for p in ours]
    for optimizer, parameters in ((one, ours), (other, theirs)):
        train(optimizer, parameters, range(50), frozen=4)
    for group, same in zip(one.param_groups, other.param_groups, strict=True):
        assert group["d"] == pytest.approx(same["d"], rel=1e-6)
        assert group["k"] == same["k"]
    for p, q, before in zip(ours, theirs, begun, strict=True):
        moved = (q - before).abs().max().clamp_min(1e-6)
        assert ((p - q).abs().max() / moved).item() < 1e-5, name
    if name == "defaults":
        assert max((p - before).abs().max() for p, before in zip(ours, begun, strict=True)) > 1e-3
    one.eval(), other.eval()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    one.train(), other.train()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_tensor_without_gradients_has_no_state() -> None:
    parameters = tensors()
    optimizer = optimizer_of(StackedProdigyPlus, parameters)
    before = parameters[4].detach().clone()
    train(optimizer, parameters, range(3), frozen=4)
    assert set(optimizer.state_dict()["state"]) == set(range(len(SHAPES))) - {4}
    assert torch.equal(parameters[4], before)


@pytest.mark.parametrize("name", ["defaults", "not factored", "frozen d", "no averaging", "speed"])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_the_saved_state_has_the_librarys_format(name: str, start: float) -> None:
    ours, theirs = tensors(start=start), tensors(start=start)
    one = optimizer_of(StackedProdigyPlus, ours, **OPTIONS[name])
    other = optimizer_of(ProdigyPlusScheduleFree, theirs, **OPTIONS[name])
    train(one, ours, range(12)), train(other, theirs, range(12))
    saved, expected = one.state_dict()["state"], other.state_dict()["state"]
    assert saved.keys() == expected.keys()
    for index in saved:
        assert saved[index].keys() == expected[index].keys()
        for key, value in expected[index].items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(saved[index][key], value, rtol=1e-4, atol=1e-6)
            else:
                assert saved[index][key] == pytest.approx(value)


@pytest.mark.parametrize("name", ["defaults", "not factored", "frozen d", "no averaging", "cautious"])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_a_loaded_state_continues_bit_for_bit(name: str, start: float) -> None:
    whole = tensors(start=start)
    optimizer = optimizer_of(StackedProdigyPlus, whole, **OPTIONS[name])
    train(optimizer, whole, range(5))
    saved = deepcopy(optimizer.state_dict())
    parts = adjacent([nn.Parameter(p.detach().clone()) for p in whole])
    second = optimizer_of(StackedProdigyPlus, parts, **OPTIONS[name])
    second.load_state_dict(saved)
    _restore_dtypes(second, saved["state"])  # torch casts them to the dtype of the parameters
    train(optimizer, whole, range(5, 15))
    train(second, parts, range(5, 15))
    for p, q in zip(whole, parts, strict=True):
        assert torch.equal(p, q)


def test_tensors_that_move_in_memory_keep_their_state() -> None:
    still, moved = tensors(), tensors()
    optimizers = [optimizer_of(StackedProdigyPlus, parameters) for parameters in (still, moved)]
    train(optimizers[0], still, range(6))
    train(optimizers[1], moved, range(3))
    for p in moved:
        p.data = p.data.clone()
    train(optimizers[1], moved, range(3, 6))
    for p, q in zip(still, moved, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
