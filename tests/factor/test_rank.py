from __future__ import annotations

import pytest

from spectune.errors import InputError
from spectune.factor.rank import FixedRank, full_rank, rank_of


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((640, 640), 64), ((640, 320, 1, 1), 64), ((640, 320, 3, 3), 16), ((4, 320, 3, 3), 4)],
)
def test_large_kernels_have_a_rank_of_their_own(shape: tuple[int, ...], expected: int) -> None:
    assert rank_of(FixedRank(64, conv_rank=16), shape) == expected


def test_without_a_conv_rank_one_rank_serves_all() -> None:
    assert rank_of(FixedRank(64), (640, 320, 3, 3)) == 64
    assert full_rank((320, 4, 3, 3)) == 36


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="rank is 0: expected at least 1"):
        FixedRank(0)
    with pytest.raises(InputError, match="conv rank is -1"):
        FixedRank(4, conv_rank=-1)
