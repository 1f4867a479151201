"""Test deltas computed from a change: exact inside the frame's spaces, best outside, zero for zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectune.core.delta import Delta, change
from spectune.core.linalg import norm
from spectune.core.low_rank import LowRank, product
from spectune.core.split import split_weight
from spectune.ops.export.extraction import extract_delta

SHAPES = [(48, 80), (80, 48), (40, 12, 3, 3), (40, 24, 1, 1)]


def weight_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


def frame_of(shape: tuple[int, ...], *, store: torch.dtype = torch.float32) -> LowRank:
    return split_weight(weight_of(shape), rank=8, store=store).low_rank


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.5])
def test_the_change_of_a_trained_delta_is_recovered(shape: tuple[int, ...], size: float) -> None:
    frame = frame_of(shape)
    trained = Delta(
        frame, size * weight_of(tuple(frame.down.shape), 1), size * weight_of(tuple(frame.up.shape), 2)
    )
    wanted = change(trained)
    extracted = extract_delta(frame, wanted)
    assert extracted.report.error < 2e-5
    assert norm(change(extracted.delta) - wanted) == pytest.approx(
        extracted.report.error * extracted.report.norm, rel=1e-3
    )
    # the gauge keeps the deltas as small as trained ones
    assert norm(extracted.delta.down) < 1.5 * max(norm(trained.down), norm(trained.up))
    assert norm(extracted.delta.up) < 1.5 * max(norm(trained.down), norm(trained.up))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_the_loss_is_the_smallest_possible(shape: tuple[int, ...], size: float) -> None:
    frame = frame_of(shape, store=torch.float16)
    wanted = size * weight_of(shape, 3)
    extracted = extract_delta(frame, wanted)
    values = torch.linalg.svdvals((product(frame).double() + wanted.double()).flatten(1))
    best = float(values[8:].square().sum().sqrt())
    assert extracted.report.error * norm(wanted) == pytest.approx(best, rel=1e-4)
    assert norm(wanted - change(extracted.delta)) == pytest.approx(best, rel=1e-4)
    # 1 % more of the change is further away
    assert norm(wanted - 1.01 * change(extracted.delta)) > best * (1 + 1e-6)
    assert extracted.delta.frame is frame


def test_no_change_gives_deltas_of_zero() -> None:
    frame = frame_of((48, 80), store=torch.bfloat16)
    extracted = extract_delta(frame, torch.zeros(48, 80))
    assert not extracted.delta.down.any()
    assert not extracted.delta.up.any()
    assert extracted.delta.down.dtype == torch.float32
    assert (extracted.report.norm, extracted.report.error) == (0, 0)


def test_the_scale_of_a_frame_counts() -> None:
    frame = frame_of((48, 80))
    doubled = LowRank(frame.down, frame.up / 2, alpha=16.0)
    wanted = change(Delta(frame, 0.01 * weight_of((8, 80), 1), 0.01 * weight_of((48, 8), 2)))
    extracted = extract_delta(doubled, wanted)
    assert norm(change(extracted.delta) - wanted) / norm(wanted) < 2e-5
