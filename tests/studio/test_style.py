"""Colors: enough contrast in both themes."""

from __future__ import annotations

import re

import pytest

from spectune.studio.rendering import STATIC

STYLE = (STATIC / "app.css").read_text(encoding="utf-8")
TEXTS = ("text", "quiet", "accent", "good", "warn", "bad")
PAIRS = [
    *((text, ground) for text in TEXTS for ground in ("page", "card")),
    *(("text", f"{kind}-soft") for kind in ("accent", "good", "warn", "bad")),
    ("accent", "accent-soft"),
    ("accent-text", "accent"),
]


def colors(selector: str) -> dict[str, str]:
    block = STYLE.partition(f"{selector} {{")[2].partition("}")[0]
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))


def luminance(color: str) -> float:
    """Return the relative luminance, WCAG 2.1."""
    channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    darker, lighter = sorted((luminance(first), luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("selector", [":root", ':root[data-theme="dark"]'])
def test_texts_have_a_contrast_of_4_5_and_borders_of_3(selector: str) -> None:
    found = colors(selector)
    ratios = {(text, ground): contrast(found[text], found[ground]) for text, ground in PAIRS}
    assert {pair: round(ratio, 2) for pair, ratio in ratios.items() if ratio < 4.5} == {}
    lines = {
        (line, ground): contrast(found[line], found[ground])
        for line in ("field-line", "series-1", "series-2", "series-3", "series-4")
        for ground in ("page", "card")
    }
    assert {pair: round(ratio, 2) for pair, ratio in lines.items() if ratio < 3} == {}


def test_the_dark_theme_is_the_same_by_choice_and_by_the_system() -> None:
    assert colors(':root[data-theme="dark"]') == colors(':root[data-theme="auto"]') != colors(":root")


def test_the_contrast_of_black_and_white_is_21() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
