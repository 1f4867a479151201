"""Weightings of noise levels against values computed by hand."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from spectune.model.prediction import Ddpm, Flow
from spectune.training.objective.weightings import (
    GAMMA_WEIGHTINGS,
    WEIGHTINGS,
    WeightingOptions,
    like_noise,
)

Name = Literal["eps", "v"]


def weights(name: str, prediction: Name, snr: list[float], **options: float) -> list[float]:
    settings = WeightingOptions(prediction, **options)  # pyright: ignore[reportArgumentType]
    return WEIGHTINGS[name](torch.tensor(snr), settings).tolist()


@pytest.mark.parametrize("name", ["none", "edm2"])
def test_no_weighting(name: str) -> None:
    assert weights(name, "eps", [0.0, 0.1, 9.0]) == [1.0, 1.0, 1.0]


# min(snr, 5)/snr and min(snr, 5)/(snr + 1) at snr = 1, 5, 20
@pytest.mark.parametrize(
    ("prediction", "expected"), [("eps", [1.0, 1.0, 5 / 20]), ("v", [1 / 2, 5 / 6, 5 / 21])]
)
def test_min_snr_by_hand(prediction: Name, expected: list[float]) -> None:
    assert weights("min_snr", prediction, [1.0, 5.0, 20.0]) == pytest.approx(expected)


def test_soft_min_snr_by_hand() -> None:
    # snr = 3, gamma = 1: soft minimum 3*1/(3+1) = 3/4; over snr = 1/4, over snr + 1 = 3/16
    assert weights("soft_min_snr", "eps", [3.0], min_snr_gamma=1.0) == pytest.approx([1 / 4])
    assert weights("soft_min_snr", "v", [3.0], min_snr_gamma=1.0) == pytest.approx([3 / 16])
    assert weights("soft_min_snr", "eps", [5.0]) == pytest.approx([1 / 2])  # half of min_snr at snr = gamma


def test_debiased_by_hand() -> None:
    assert weights("debiased", "eps", [4.0, 0.25, 4000.0]) == pytest.approx([0.5, 2.0, 1000**-0.5])
    assert weights("debiased", "v", [4.0, 0.25]) == pytest.approx([1 / 5, 1 / 1.25])


def test_debiased_has_no_lower_bound_within_the_schedule_of_sdxl() -> None:
    times = torch.tensor([999])
    last = Ddpm().snr(times)
    expected = 1 / math.sqrt(last.item())
    assert WEIGHTINGS["debiased"](last, WeightingOptions("eps")).item() == pytest.approx(expected)
    # with zero terminal SNR the weights are bounded by sqrt(1000)
    zero = Ddpm("eps", zero_terminal_snr=True).snr(torch.tensor([998]))
    assert WEIGHTINGS["debiased"](zero, WeightingOptions("eps")).item() == pytest.approx(math.sqrt(1000))


def test_like_noise_by_hand_and_by_its_definition() -> None:
    assert like_noise(torch.tensor([0.0, 3.0, math.inf])).tolist() == pytest.approx([0.0, 3 / 4, 1.0])
    # the same network as an eps and as a v model: its squared errors differ by exactly this weight
    generator = torch.Generator().manual_seed(0)
    x0, noise, wrong = torch.randn(3, 3, 1, 2, 2, generator=generator)
    times, v, eps = torch.tensor([10, 500, 990]), Ddpm("v"), Ddpm("eps")
    noised = v.add_noise(x0, noise, times)
    v_error = (wrong - v.target(x0, noise, times)).square().mean((1, 2, 3))
    eps_error = (v.noise(noised, wrong, times) - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(v_error * like_noise(eps.snr(times)), eps_error, rtol=1e-3, atol=1e-6)


def test_like_noise_multiplies_a_weighting() -> None:
    snr = torch.tensor([3.0])
    options = WeightingOptions("v", scale_v_like_noise=True)
    assert WEIGHTINGS["none"](snr, options).item() == pytest.approx(3 / 4)
    # min_snr of v at snr = 3: 3/4
    assert WEIGHTINGS["min_snr"](snr, options).item() == pytest.approx(9 / 16)
    assert WEIGHTINGS["min_snr"](snr, WeightingOptions("v")).item() == pytest.approx(3 / 4)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_are_finite_from_pure_noise_to_clean_latents(name: str, prediction: Name) -> None:
    schedule = Ddpm("v", zero_terminal_snr=True).snr(torch.tensor([0, 999]))
    edges = torch.cat([schedule, Ddpm().snr(torch.tensor([0, 999])), Flow().snr(torch.tensor([0.0, 1.0]))])
    assert edges[[1, 4, 5]].tolist() == [0.0, math.inf, 0.0]
    for scaled in (False, True):
        options = WeightingOptions(prediction, scale_v_like_noise=scaled)
        values = WEIGHTINGS[name](edges, options)
        assert bool(values.isfinite().all())
        assert bool((values >= 0).all())


def test_limits_of_min_snr_in_pure_noise() -> None:
    assert weights("min_snr", "eps", [0.0]) == [1.0]
    assert weights("min_snr", "v", [0.0]) == [0.0]


def test_gamma_weightings_are_those_that_gamma_changes() -> None:
    changed = [
        name
        for name in WEIGHTINGS
        if weights(name, "eps", [20.0], min_snr_gamma=1.0) != weights(name, "eps", [20.0], min_snr_gamma=5.0)
    ]
    assert tuple(changed) == GAMMA_WEIGHTINGS


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_weighting_is_described(name: str) -> None:
    weighting = WEIGHTINGS[name]
    assert all((weighting.help, weighting.formula, weighting.source))
    assert "\n" not in weighting.help
