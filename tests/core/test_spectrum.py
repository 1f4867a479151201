"""Singular values without vectors, their energies and their decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spectune.core.spectrum import decay_exponent, energy_at, energy_curve, singular_values
from spectune.errors import InputError


def with_values(values: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    """Return a float64 matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    side = len(values)
    u, _ = torch.linalg.qr(torch.randn(rows, side, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, side, generator=generator, dtype=torch.float64))
    return (u * values) @ v.T


def power_law(count: int, decay: float) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64) ** -decay


@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (64, 200), (200, 64), (600, 640), (2100, 520)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_match_the_svd(rows: int, columns: int, dtype: torch.dtype) -> None:
    matrix = with_values(power_law(min(rows, columns), 0.4), rows, columns).to(dtype)
    exact = torch.linalg.svdvals(matrix.double())
    values = singular_values(matrix)
    assert values.dtype == torch.float64
    assert values.shape == (min(rows, columns),)
    assert (energy_curve(values) - energy_curve(exact)).abs().max() < 1e-6
    assert torch.allclose(values, exact, rtol=0, atol=1e-5 * float(exact[0]))


@pytest.mark.parametrize("side", [500, 640])  # float64 and float32 sums
@pytest.mark.parametrize("decay", [0.0, 1.5, 4.0])
def test_energies_are_accurate_for_flat_and_steep_spectra(side: int, decay: float) -> None:
    matrix = with_values(power_law(side, decay), side, side).float()
    exact = energy_curve(torch.linalg.svdvals(matrix.double()))
    values = singular_values(matrix)
    assert (energy_curve(values) - exact).abs().max() < 1e-4
    assert bool(torch.isfinite(values).all())
    assert bool((values[1:] <= values[:-1]).all())
    assert float(values[-1]) >= 0.0


def test_a_value_off_by_one_percent_changes_the_energies() -> None:
    matrix = with_values(power_law(64, 0.4), 64, 64)
    exact = energy_curve(torch.linalg.svdvals(matrix))
    u, s, vh = torch.linalg.svd(matrix)
    s[0] *= 1.01
    assert (energy_curve(singular_values((u * s) @ vh)) - exact).abs().max() > 1e-3


@pytest.mark.parametrize("side", [96, 600])
def test_missing_directions_have_value_zero(side: int) -> None:
    matrix = with_values(power_law(7, 0.5), side, side).float()
    values = singular_values(matrix)
    assert int((values > 0).sum()) == 7
    assert energy_at(energy_curve(values), 7) == 1.0


def test_a_zero_matrix_has_zero_values_and_share_one() -> None:
    values = singular_values(torch.zeros(3, 5))
    assert values.tolist() == [0.0, 0.0, 0.0]
    assert energy_curve(values).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_values_whose_squares_overflow_or_underflow_float32_are_accurate(size: float) -> None:
    matrix = with_values(power_law(600, 0.5), 600, 600).float() * size
    assert float(singular_values(matrix)[0]) == pytest.approx(size, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_damaged_weights_are_refused(bad: float) -> None:
    matrix = torch.ones(4, 6)
    matrix[1, 2] = matrix[3, 0] = bad
    with pytest.raises(InputError, match=r"unet\.x: 2 of 24 values are NaN or infinite"):
        singular_values(matrix, name="unet.x")


def test_the_energy_curve_is_one_at_and_beyond_full_rank() -> None:
    curve = energy_curve(torch.tensor([2.0, 1.0, 1.0]))
    assert [energy_at(curve, rank) for rank in (0, 1, 2, 3, 256)] == pytest.approx([0, 4 / 6, 5 / 6, 1, 1])


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 2.0])
def test_the_exponent_of_a_power_law_is_found(decay: float) -> None:
    assert decay_exponent(power_law(1000, decay)) == pytest.approx(decay, abs=1e-12)


def test_the_exponent_uses_only_the_first_256_values() -> None:
    values = power_law(1000, 0.4)
    values[256:] = values[255] / 2
    assert decay_exponent(values) == pytest.approx(0.4)
    assert decay_exponent(values, ranks=1000) != pytest.approx(0.4, rel=0.01)


def test_fewer_than_three_values_give_no_exponent() -> None:
    assert decay_exponent(torch.tensor([2.0, 1.0, 0.0])) is None
