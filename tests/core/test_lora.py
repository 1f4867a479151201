"""The change of a layer as LoRA factors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectune.core.delta import Delta, change
from spectune.core.lora import export_layer, exported_rank, total_error, tuned_principal
from spectune.core.low_rank import LowRank, product, to_factors
from spectune.errors import InputError

side = st.integers(2, 16)
shapes = st.one_of(
    st.tuples(side, side),
    st.tuples(side, side, st.just(3), st.just(3)),
    st.tuples(side, side, st.just(1), st.just(1)),
)


def tuned_layer(
    shape: tuple[int, ...], rank: int, *, size: float, seed: int = 0, scale: float = 1.0
) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    columns = int(torch.tensor(shape[1:]).prod())

    def pair(factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        up = factor * torch.randn(shape[0], rank, generator=generator)
        return to_factors(up, factor * torch.randn(rank, columns, generator=generator), shape)

    (frame_up, frame_down), (up, down) = pair(1.0), pair(size)
    frame = LowRank(down=frame_down.half(), up=frame_up.half(), alpha=scale * rank)
    return Delta(frame=frame, down=down, up=up)


@given(shapes, st.integers(1, 4), st.sampled_from([1.0, 0.5]), st.sampled_from([1.0, 1e-2, 1e-4]))
@settings(deadline=None, max_examples=60)
def test_a_float32_export_is_exact_up_to_rounding(
    shape: tuple[int, ...], rank: int, scale: float, size: float
) -> None:
    delta = tuned_layer(shape, rank, size=size, scale=scale)
    exported = export_layer(delta, store=torch.float32)
    assert exported.report.error < 2e-6
    assert exported.low_rank.scale == 1.0
    assert exported.low_rank.down.shape[1:] == shape[1:]
    assert product(exported.low_rank).shape == shape


@pytest.mark.parametrize(
    ("store", "refactored", "naive"), [(torch.float16, 1e-3, 2e-3), (torch.bfloat16, 6e-3, 0.05)]
)
def test_refactored_factors_round_better_than_concatenated_ones(
    store: torch.dtype, refactored: float, naive: float
) -> None:
    delta = tuned_layer((96, 128), 8, size=1e-2)
    exported = export_layer(delta, store=store)
    assert exported.report.error < refactored
    frame = delta.frame
    # the difference of tuned and untuned factors, [-B0, B0+dB] [A0; A0+dA], cancels
    up = torch.cat([-frame.up.float(), frame.up.float() + delta.up], dim=1).to(store)
    down = torch.cat([frame.down.float(), frame.down.float() + delta.down]).to(store)
    difference = product(LowRank(down=down, up=up, alpha=16.0)) - change(delta)
    assert float(difference.norm() / change(delta).norm()) > naive


def test_a_smaller_rank_keeps_the_largest_directions() -> None:
    delta = tuned_layer((40, 30), 4, size=0.1)
    exported = export_layer(delta, rank=3, store=torch.float32)
    values = torch.linalg.svdvals(change(delta).double())
    best = float((values[3:].square().sum() / values.square().sum()).sqrt())
    assert exported.report.error == pytest.approx(best, rel=1e-4)
    assert (exported.report.rank, exported.report.full_rank, exported.report.truncated) == (3, 8, True)
    up, down = exported.low_rank.up, exported.low_rank.down
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), rtol=1e-5, atol=0)
    assert bool((up.gather(0, up.abs().argmax(0, keepdim=True)) > 0).all())


def test_the_shape_limits_the_rank() -> None:
    delta = tuned_layer((4, 40), 3, size=0.1)
    assert exported_rank(delta, None) == 4
    assert exported_rank(delta, 64) == 4
    with pytest.raises(InputError, match="`rank` is 0: expected at least 1"):
        exported_rank(delta, 0)


def test_a_zero_change_exports_zeros() -> None:
    delta = tuned_layer((12, 10, 3, 3), 2, size=0.0)
    exported = export_layer(delta)
    assert not exported.low_rank.up.any()
    assert (exported.report.error, exported.report.norm) == (0.0, 0.0)
    assert total_error([exported.report]) == 0.0


def test_a_change_with_nan_is_refused() -> None:
    delta = tuned_layer((12, 10), 2, size=0.1)
    delta.up[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"the change of te1\.x: 1 of 24 values are NaN") as caught:
        export_layer(delta, name="te1.x")
    assert caught.value.hint == "the training may have diverged: export an earlier step"


def test_the_tuned_principal_is_frame_plus_change_and_reports_its_rounding() -> None:
    delta = tuned_layer((64, 64), 8, size=1e-3)
    exact = tuned_principal(delta, store=torch.float32)
    torch.testing.assert_close(
        product(exact.low_rank), product(delta.frame) + change(delta), rtol=1e-4, atol=1e-5
    )
    assert exact.report.error < 1e-3
    assert tuned_principal(delta, store=torch.bfloat16).report.error > 0.5
