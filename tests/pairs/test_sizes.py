from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectune.errors import InputError
from spectune.pairs.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("word", "nbytes"),
    [
        ("600MB", 600_000_000),
        ("600 mb", 600_000_000),
        ("600MiB", 629_145_600),
        ("1.5GB", 1_500_000_000),
        ("0.7GB", 700_000_000),
        (".5GiB", 536_870_912),
        ("64kB", 64_000),
        ("64KiB", 65_536),
        ("512", 512),
        ("512B", 512),
    ],
)
def test_sizes_are_parsed(word: str, nbytes: int) -> None:
    assert parse_bytes(word) == nbytes


@given(st.integers(1, 10**13))
def test_sizes_round_trip(nbytes: int) -> None:
    assert parse_bytes(format_bytes(nbytes)) == nbytes


@pytest.mark.parametrize(
    ("nbytes", "word"),
    [
        (600_000_000, "600MB"),
        (2_000_000_000, "2GB"),
        (1_500_000_000, "1500MB"),
        (2**30, "1GiB"),
        (1001, "1001B"),
    ],
)
def test_sizes_are_written_in_the_largest_unit_that_divides_them(nbytes: int, word: str) -> None:
    assert format_bytes(nbytes) == word


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lots", "unreadable size 'lots'"),
        ("-5MB", "unreadable size '-5MB'"),
        ("", "unreadable size ''"),
        ("600MBs", "unknown unit 'MBs' in '600MBs'; did you mean `MB`?"),
        ("0.5B", "'0.5B' is 0.5 bytes: expected a whole number"),
    ],
)
def test_other_text_is_refused(word: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_bytes(word)
    assert refused.value.what == message
    assert "600MB" in (refused.value.hint or "")
