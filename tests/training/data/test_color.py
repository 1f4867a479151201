from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectune.training.data.color import (
    GAMMA,
    HUE_TURNS,
    SATURATION,
    ColorChange,
    Levels,
    draw_color,
    from_hsv,
    recolor,
    to_hsv,
)

UNCHANGED = ColorChange(hue=0.0, saturation=1.0, gamma=1.0)
LEVEL = st.integers(0, 255).map(lambda level: level / 255)


def pixel(red: float, green: float, blue: float) -> Levels:
    return np.array([[[red]], [[green]], [[blue]]], dtype=np.float32)


@pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        # 0.8, 0.4, 0.2 has the hue 20 degrees, saturation 0.75, value 0.8; 60 degrees more make it green
        (ColorChange(1 / 6, 1.0, 1.0), (0.8, 0.4, 0.2), (0.6, 0.8, 0.2)),
        (ColorChange(-1 / 6, 1.0, 1.0), (0.8, 0.4, 0.2), (0.8, 0.2, 0.6)),
        (ColorChange(1 / 3, 1.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
        # the value stays 0.8, chroma goes from 0.6 to 0.3; green stays a third of the way from blue to red
        (ColorChange(0.0, 0.5, 1.0), (0.8, 0.4, 0.2), (0.8, 0.6, 0.5)),
        (ColorChange(0.0, 2.0, 1.0), (0.8, 0.4, 0.2), (0.8, 0.8 / 3, 0.0)),
        (ColorChange(0.0, 1.0, 2.0), (0.5, 1.0, 0.1), (0.25, 1.0, 0.01)),
        (ColorChange(0.2, 1.1, 1.05), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
        (ColorChange(0.2, 1.1, 0.95), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    ],
)
def test_changes_computed_by_hand(
    change: ColorChange, before: tuple[float, float, float], after: tuple[float, float, float]
) -> None:
    changed = recolor(pixel(*before), change)
    assert changed.dtype == np.float32
    assert changed[:, 0, 0].tolist() == pytest.approx(after, abs=1e-6)


@given(LEVEL, LEVEL, LEVEL)
def test_hsv_round_trips(red: float, green: float, blue: float) -> None:
    levels = pixel(red, green, blue)
    hsv = to_hsv(levels)
    assert (hsv >= 0).all()
    assert (hsv[0] <= 1).all()
    np.testing.assert_allclose(from_hsv(hsv), levels, atol=2e-6)
    np.testing.assert_allclose(recolor(levels, UNCHANGED), levels, atol=2e-6)


def test_probability_and_range_of_changes() -> None:
    random = Random(0)
    drawn = [draw_color(0.25, random) for _ in range(4000)]
    changes = [change for change in drawn if change is not None]
    assert len(changes) / 4000 == pytest.approx(0.25, abs=0.02)
    hues, saturations, gammas = zip(*((c.hue, c.saturation, c.gamma) for c in changes), strict=True)
    for values, middle, reach in ((hues, 0, HUE_TURNS), (saturations, 1, SATURATION), (gammas, 1, GAMMA)):
        assert min(values) == pytest.approx(middle - reach, abs=0.02 * reach)
        assert max(values) == pytest.approx(middle + reach, abs=0.02 * reach)


def test_no_random_number_is_drawn_at_probability_0() -> None:
    random = Random(0)
    state = random.getstate()
    assert draw_color(0.0, random) is None
    assert random.getstate() == state
    assert draw_color(1.0, random) is not None
    assert random.getstate() != state
