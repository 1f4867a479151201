"""Distributions of noise levels against values computed by hand."""

import math

import pytest
import torch

from spectune.errors import InputError
from spectune.model.noise_levels import DISTRIBUTIONS, UNIFORM, Beta, LogitNormal, Mixed, make_levels
from spectune.model.prediction import Flow

SHARES = torch.tensor([0.0, 1e-4, 0.25, 0.5, 0.9, 0.9999])


@pytest.mark.parametrize(
    "levels",
    [UNIFORM, LogitNormal(-0.5, 1.5), Beta(2.0, 1.0), Beta(0.5, 3.0), Mixed(Beta(5.0, 1.0), 0.2)],
    ids=str,
)
def test_quantiles_and_shares_are_inverses(levels):
    assert torch.allclose(levels.share_below(levels.quantiles(SHARES.double())).float(), SHARES, atol=1e-6)
    drawn = levels.sample(100_000, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, levels.sample(100_000, torch.Generator().manual_seed(0)))
    below = (drawn[:, None] < levels.quantiles(SHARES)).float().mean(0)
    torch.testing.assert_close(below, SHARES, rtol=0, atol=0.005)


def test_beta_by_hand():
    # the density 2s has the shares s^2
    assert Beta(2.0, 1.0).share_below(torch.tensor([0.3, 0.5])).tolist() == pytest.approx([0.09, 0.25])
    assert Beta(2.0, 1.0).quantiles(torch.tensor([0.25])).item() == pytest.approx(0.5)
    # density ~ (1-s)^2: shares 1 - (1-s)^3
    assert Beta(1.0, 3.0).share_below(torch.tensor([0.5])).item() == pytest.approx(1 - 0.125)


def test_a_mixture_by_hand():
    mixed = Mixed(Beta(2.0, 1.0), 0.5)
    assert mixed.share_below(torch.tensor([0.4])).item() == pytest.approx((0.4 + 0.16) / 2)
    # (s + s^2)/2 = 1/4 at s = (sqrt(3) - 1)/2
    assert mixed.quantiles(torch.tensor([0.25])).item() == pytest.approx((math.sqrt(3) - 1) / 2)
    assert Mixed(Beta(2.0, 1.0), 0.51).quantiles(torch.tensor([0.25])).item() != pytest.approx(
        (math.sqrt(3) - 1) / 2, rel=1e-3
    )


def test_distributions_by_name():
    assert make_levels("logit_normal", {"mean": 1.0, "std": 2.0}) == LogitNormal(1.0, 2.0)
    assert make_levels("beta", {"alpha": 2.0, "beta": 3.0}, uniform_share=0.1) == Mixed(Beta(2.0, 3.0), 0.1)
    assert list(DISTRIBUTIONS) == ["uniform", "logit_normal", "beta"]


# ---------------------------------------------------------------- limits


def test_limits_apply_after_the_shift():
    # shift 2 moves 1/3 to 1/2 and 2/3 to 4/5; the middle between 1/3 and 2/3 is 1/2, which moves to 2/3
    flow = Flow(2.0, lowest=0.5, highest=0.8)
    assert flow.shares_of_limits() == pytest.approx((1 / 3, 2 / 3))
    assert flow.even_times(1).item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("levels", [UNIFORM, LogitNormal(), Mixed(Beta(3.0, 1.0), 0.3)], ids=str)
def test_a_limited_distribution_is_the_part_between_the_limits(levels):
    flow, whole = Flow(2.5, levels, lowest=0.3, highest=0.9), Flow(2.5, levels)
    drawn = flow.sample_times(20_000, torch.Generator().manual_seed(1))
    assert (drawn.min() >= 0.3, drawn.max() <= 0.9, drawn.dtype) == (True, True, torch.float32)
    everything = whole.sample_times(100_000, torch.Generator().manual_seed(2))
    part = everything[(everything > 0.3) & (everything < 0.9)]
    shares = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(drawn.quantile(shares), part.quantile(shares), rtol=0, atol=0.01)


def test_limits_without_noise_levels_are_an_error():
    with pytest.raises(InputError, match=r"share of only .* is between 0.9 and 1"):
        Flow(1.0, LogitNormal(0.0, 0.01), lowest=0.9).even_times(3)


def test_limits_depend_on_the_area_with_a_shift_by_resolution():
    flow = Flow("resolution", highest=0.5)
    assert torch.equal(flow.even_times(4, pixels=2048**2), Flow(2.0, highest=0.5).even_times(4))


def test_integer_timesteps_are_those_of_public_trainers():
    levels = torch.tensor([0.0, 0.2509, 0.9999, 1.0])
    assert Flow(timesteps="integer").timestep(levels).tolist() == [0, 250, 999, 999]
    torch.testing.assert_close(Flow().timestep(levels), torch.tensor([0.0, 250.9, 999.9, 1000.0]))
