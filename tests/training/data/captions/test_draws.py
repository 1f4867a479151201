from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectune.training.data.captions.draws import draw_caption, fixed_caption, has_wildcard, template_of
from spectune.training.recipe.sections.captions import CaptionSection


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


def draws(template: str, rules: CaptionSection, count: int = 60) -> set[str]:
    return {draw_caption(template, rules, Random(seed)) for seed in range(count)}


def test_tags_before_the_separator_and_after_a_second_one_stay() -> None:
    rules = CaptionSection(shuffle=True, keep_tokens_separator="|||")
    drawn = draws("1girl, solo ||| red, round ||| best, 4k", rules)
    assert drawn == {"1girl, solo, red, round, best, 4k", "1girl, solo, round, red, best, 4k"}
    assert len(draws("a, b, c", rules)) == 6
    dropped = CaptionSection(tag_dropout_probability=1.0, keep_tokens_separator="|||")
    assert draws("a, b|||c, d", dropped) == {"a, b"}


def test_a_separator_is_removed_without_shuffling_too() -> None:
    rules = CaptionSection(keep_tokens_separator="|||")
    assert not rules.varies
    assert draws("a|||b, c", rules) == {"a, b, c"} == {fixed_caption("a|||b, c", rules)}
    assert fixed_caption("a,b ,c", rules) == "a,b ,c"
    assert fixed_caption("a|||b", CaptionSection()) == "a|||b"


def test_wildcards_are_drawn_and_doubled_braces_are_braces() -> None:
    rules = CaptionSection(wildcards=True)
    assert draws("a {red|green|} cat {{x|y}}", rules) == {
        "a red cat {x|y}",
        "a green cat {x|y}",
        "a  cat {x|y}",
    }
    assert fixed_caption("a {red|green} cat", rules) == "a red cat"
    assert draws("a {red|green} cat", CaptionSection()) == {"a {red|green} cat"}
    assert [has_wildcard(text) for text in ("a {b|c}", "a {{b|c}}", "{b}")] == [True, False, False]


def test_braces_without_an_end_take_linear_time() -> None:
    """A search from each of them to the end takes minutes."""
    text = "{a" * 500_000
    assert not has_wildcard(text)
    assert fixed_caption(f"{{b|c}} {text}", CaptionSection(wildcards=True)) == f"b {text}"


def test_a_line_is_drawn_with_prefix_and_suffix() -> None:
    rules = CaptionSection(lines="random", prefix="art of", suffix=", best")
    template = template_of(["a cat", "a dog"], rules)
    assert draws(template, rules) == {"art of a cat , best", "art of a dog , best"}
    assert fixed_caption(template, rules) == "art of a cat , best"
    assert template_of([""], CaptionSection(prefix="p")) == "p"


def test_a_draw_depends_on_its_random_numbers_only() -> None:
    rules = CaptionSection(lines="random", wildcards=True, shuffle=True)
    template = "{a|b}, c, d\n{e|f}, g"
    assert draw_caption(template, rules, Random(7)) == draw_caption(template, rules, Random(7))
    assert rules.varies
    assert len(draws(template, rules)) == 2 * 6 + 2 * 2
