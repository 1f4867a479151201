"""Forgetting is compared at equal gain."""

from __future__ import annotations

import pytest

from experiments.forgetting import GAIN, at_equal_gain, rise_at

CURVE = [(0.0, 0.0), (0.02, 0.010), (0.04, 0.006)]  # forgetting may fall while the gain rises


@pytest.mark.parametrize(("gain", "rise"), [(0.01, 0.005), (0.02, 0.010), (0.03, 0.008), (0.04, 0.006)])
def test_the_rise_at_a_gain_is_interpolated(gain: float, rise: float) -> None:
    assert rise_at(CURVE, gain) == pytest.approx(rise)


def test_a_gain_that_is_not_reached_has_no_rise() -> None:
    assert rise_at(CURVE, 0.041) is None
    reaching, short = [(0.0, 0.0), (2 * GAIN, 0.02)], [(0.0, 0.0), (GAIN / 2, 0.02)]
    assert at_equal_gain([reaching, short]) == "in 1 of 2 seeds"
    assert at_equal_gain([reaching, reaching]) == "0.0100 ± 0.0000"
