from __future__ import annotations

import importlib
import inspect
import math
import sys
from typing import Any

import pytest

from spectune.errors import SpectuneError
from spectune.training.optim.groups import build_optimizer, groups_by_part
from spectune.training.optim.kinds import OPTIMIZERS, check_options, traits_of
from tests.training.optim.deltas import trained

# name: (class of the library, its arguments that are not options, its defaults that differ on purpose)
LIBRARIES: dict[str, tuple[str, set[str], dict[str, Any]]] = {
    "adamw": (
        "torch.optim.AdamW",
        {"amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"},
        {"weight_decay": 1e-2},
    ),
    "adamw8bit": (
        "bitsandbytes.optim.AdamW8bit",
        {"amsgrad", "optim_bits", "args", "is_paged"},
        {"weight_decay": 1e-2},
    ),
    "adafactor": (
        "transformers.optimization.Adafactor",
        set(),
        {"scale_parameter": True, "relative_step": True},
    ),
    "lion": ("lion_pytorch.Lion", {"use_triton"}, {}),
    "dadapt_adam": ("dadaptation.DAdaptAdam", {"log_every", "fsdp_in_use"}, {"growth_rate": math.inf}),
    "prodigy": ("prodigyopt.Prodigy", {"fsdp_in_use"}, {"growth_rate": math.inf}),
    "adamw_schedule_free": ("schedulefree.AdamWScheduleFree", {"foreach"}, {}),
    "prodigy_plus_schedule_free": ("prodigyplus.ProdigyPlusScheduleFree", {"fused_back_pass"}, {}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_defaults_are_those_of_the_library(name: str) -> None:
    path, not_options, differing = LIBRARIES[name]
    module, _, class_name = path.rpartition(".")
    signature = inspect.signature(getattr(importlib.import_module(module), class_name).__init__)
    theirs = {
        key: parameter.default
        for key, parameter in signature.parameters.items()
        if key not in not_options | {"self", "params", "lr"}
    }
    ours = check_options(name, {}).model_dump()
    assert theirs == {**ours, **differing}
    assert all(ours[key] != value for key, value in differing.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_is_off_by_default(name: str) -> None:
    assert check_options(name, {}).model_dump()["weight_decay"] == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unknown_options_are_named_with_a_suggestion(name: str) -> None:
    message = f"^{name} has no option `weight_dcay`; did you mean `weight_decay`\\?$"
    with pytest.raises(ValueError, match=message):
        check_options(name, {"weight_dcay": 0.1})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamw8bit", {"min_8bit_size": 0}, "option `min_8bit_size` of adamw8bit: Input should be greater"),
        ("adafactor", {"decay_rate": 0.8}, "option `decay_rate` of adafactor: Input should be less than 0"),
        ("adafactor", {"warmup_init": True}, "adafactor: `warmup_init` does nothing without `relative_step`"),
        ("lion", {"betas": [0.9, 1.0]}, "option `betas` of lion: Input should be less than 1, got 1.0"),
        ("dadapt_adam", {"growth_rate": math.inf}, "option `growth_rate` of dadapt_adam: Input should be a"),
        ("dadapt_adam", {"d0": 0}, "option `d0` of dadapt_adam: Input should be greater than 0, got 0"),
        (
            "prodigy",
            {"slice_p": 0},
            "option `slice_p` of prodigy: Input should be greater than or equal to 1",
        ),
        (
            "adamw_schedule_free",
            {"betas": [0, 0.9]},
            "option `betas` of adamw_schedule_free: Input should be",
        ),
        (
            "prodigy_plus_schedule_free",
            {"betas": [0, 0.9]},
            "the first of `betas` is 0, but schedule-free steps",
        ),
    ],
)
def test_messages_of_invalid_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(name, options)


def test_a_missing_package_is_reported_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "spectune.training.optim.eight_bit", raising=False)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(SpectuneError, match="needs bitsandbytes, which is not installed") as caught:
        build_optimizer("adamw8bit", groups_by_part(trained()))
    assert caught.value.hint == 'pip install "spectune[bnb]"'


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_default_traits_are_those_of_the_kind(name: str) -> None:
    kind, traits = OPTIMIZERS[name], traits_of(name, check_options(name, {}))
    assert traits.fixed_learning_rate == kind.fixed_learning_rate
    assert traits.schedule_free == kind.schedule_free
    assert traits.rounds_stochastically == kind.rounds_stochastically


def test_options_turn_traits_of_prodigy_plus_off() -> None:
    name = "prodigy_plus_schedule_free"
    assert not traits_of(name, check_options(name, {"use_schedulefree": False})).schedule_free
    assert not traits_of(name, check_options(name, {"stochastic_rounding": False})).rounds_stochastically
