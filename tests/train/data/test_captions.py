from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectune.errors import InputError
from spectune.train.data.captions import CaptionRules, draw_caption, read_caption


def test_the_first_line_of_the_first_file(tmp_path: Path) -> None:
    image = tmp_path / "cat.png"
    assert read_caption(image, [".txt", ".caption"]) is None
    image.with_suffix(".caption").write_text("other")
    assert read_caption(image, [".txt", ".caption"]) == "other"
    image.with_suffix(".txt").write_text("\ufeff a cat, sitting \nsecond line", encoding="utf-8")
    assert read_caption(image, [".txt", ".caption"]) == "a cat, sitting"
    image.with_suffix(".txt").write_text("")
    assert read_caption(image, [".txt"]) == ""
    image.with_suffix(".txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"cat.txt is not UTF-8 text"):
        read_caption(image, [".txt"])


@given(st.lists(st.text("abc", min_size=1), min_size=1, max_size=6), st.integers(0, 7), st.integers(0, 99))
def test_a_shuffle_keeps_all_tags_and_the_first_in_place(tags: list[str], keep: int, seed: int) -> None:
    drawn = draw_caption(",".join(tags), CaptionRules(shuffle=True, keep_tokens=keep), Random(seed)).split(
        ", "
    )
    assert sorted(drawn) == sorted(tags)
    assert drawn[:keep] == tags[:keep]


def test_dropout() -> None:
    rules = CaptionRules(dropout_probability=0.25)
    random = Random(0)
    drawn = [draw_caption("a, b", rules, random) for _ in range(2000)]
    assert set(drawn) == {"", "a, b"}
    assert drawn.count("") / 2000 == pytest.approx(0.25, abs=0.03)
    assert draw_caption("a", CaptionRules(dropout_probability=1.0), random) == ""
