from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectune.errors import InputError
from spectune.training.data.captions import draw_caption, read_caption, read_sidecar
from spectune.training.recipe.sections.data import CaptionSection


def test_the_caption_is_the_first_line_of_the_first_file(tmp_path: Path) -> None:
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
def test_shuffling_keeps_all_tags_and_does_not_move_the_first_ones(
    tags: list[str], keep: int, seed: int
) -> None:
    drawn = draw_caption(",".join(tags), CaptionSection(shuffle=True, keep_tokens=keep), Random(seed)).split(
        ", "
    )
    assert sorted(drawn) == sorted(tags)
    assert drawn[:keep] == tags[:keep]


def test_dropout() -> None:
    rules = CaptionSection(dropout_probability=0.25)
    random = Random(0)
    drawn = [draw_caption("a, b", rules, random) for _ in range(2000)]
    assert set(drawn) == {"", "a, b"}
    assert drawn.count("") / 2000 == pytest.approx(0.25, abs=0.03)
    assert draw_caption("a", CaptionSection(dropout_probability=1.0), random) == ""


def test_tags_are_dropped_independently() -> None:
    rules = CaptionSection(keep_tokens=1, tag_dropout_probability=0.25)
    random = Random(0)
    drawn = [draw_caption("cat, red , round,big", rules, random) for _ in range(3000)]
    assert all(caption.startswith("cat") for caption in drawn)
    for tag in ("red", "round", "big"):
        assert sum(tag in caption for caption in drawn) / 3000 == pytest.approx(0.75, abs=0.03)
    both = sum("red" in caption and "big" in caption for caption in drawn)
    assert both / 3000 == pytest.approx(0.75**2, abs=0.03)  # independent of each other
    assert {caption for caption in drawn if caption.count(",") == 3} == {"cat, red, round, big"}
    alone = CaptionSection(tag_dropout_probability=1.0)
    assert draw_caption("a, b", alone, random) == ""


def test_dropping_tags_does_not_change_other_draws() -> None:
    one, two = Random(5), Random(5)
    shuffled = draw_caption("a, b, c, d", CaptionSection(shuffle=True), one)
    assert (
        draw_caption("a, b, c, d", CaptionSection(shuffle=True, tag_dropout_probability=0.0), two) == shuffled
    )
    assert one.getstate() == two.getstate()


def test_a_sidecar(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_text(
        '\ufeff{"file_name": "a.png", "text": " caf\\u00e9, \u2028 red ", "width": 3}\n\n'
        '{"text": "", "file_name": "b.png"}\r\n',
        encoding="utf-8",
    )
    assert read_sidecar(path) == {"a.png": "café, \u2028 red", "b.png": ""}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "b.png", "text": "b"', r"metadata\.jsonl line 3 is not JSON"),
        ('["b.png", "b"]', r"metadata\.jsonl line 3 is not an object"),
        ('{"file_name": "b.png"}', r"metadata\.jsonl line 3 has no string `text`"),
        ('{"file_name": 7, "text": "b"}', r"metadata\.jsonl line 3 has no string `file_name`"),
        ('{"file_name": "a.png", "text": "b"}', r"metadata\.jsonl line 3 repeats a\.png"),
    ],
)
def test_damaged_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file_name": "a.png", "text": "a"}\n\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        read_sidecar(path)
