"""Test the text of sheets: scripts, replacements, lines and ellipses."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
from PIL import Image, ImageDraw

from spectune.errors import FileNote
from spectune.sampling import fonts
from spectune.sampling.fonts import ELLIPSIS, REPLACEMENT, SheetFont, note_missing

FONT = SheetFont(14)
PRIVATE = "\ue000"  # a character that STIXNonUni.ttf, a font of matplotlib, has and DejaVu has not


@pytest.fixture
def only_dejavu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fonts, "SYSTEM_FONTS", ())
    fonts._path_for.cache_clear()
    yield
    fonts._path_for.cache_clear()


def drawn(text: str) -> bytes:
    image = Image.new("RGB", (120, 24), "white")
    FONT.draw(ImageDraw.Draw(image), (0, 0), text, (0, 0, 0))
    return image.tobytes()


@pytest.mark.parametrize("text", ["caf\u00e9", "\u043b\u0438\u0441\u0430", "\u03b1\u03bb\u03b5"])
@pytest.mark.usefixtures("only_dejavu")
def test_latin_cyrillic_and_greek_need_no_font_of_the_system(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        note_missing([text])
    assert drawn(text) != drawn(REPLACEMENT * len(text))
    assert len({drawn(char) for char in text}) == len(set(text)), "no two characters look the same"


@pytest.mark.usefixtures("only_dejavu")
def test_a_character_without_a_font_is_a_visible_replacement_and_one_note() -> None:
    assert drawn("a\u72d0b") == drawn(f"a{REPLACEMENT}b")
    with pytest.warns(FileNote, match=r"no font has 2 characters of the sheet.*: U\+72D0, U\+8D64; install"):
        note_missing(["\u8d64\u3000\u72d0", "\u72d0"])


@pytest.mark.usefixtures("only_dejavu")
def test_fonts_of_the_system_draw_what_dejavu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(PRIVATE) == drawn(REPLACEMENT)
    fonts._path_for.cache_clear()
    stix = fonts._DEJAVU.replace("DejaVuSans.ttf", "STIXNonUni.ttf")
    monkeypatch.setattr(fonts, "SYSTEM_FONTS", ("no_such_font.ttc", stix))
    assert drawn(PRIVATE) not in (drawn(REPLACEMENT), drawn(""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        note_missing([PRIVATE])


def test_a_long_text_ends_in_an_ellipsis() -> None:
    text = "a red fox in the snow"
    assert FONT.shortened(text, 500) == text
    short = FONT.shortened(text, 80)
    assert short.endswith(ELLIPSIS)
    assert text.startswith(short[:-1])
    assert 60 < FONT.length(short) <= 80


def test_lines_fit_and_only_a_cut_text_has_an_ellipsis() -> None:
    text = "1girl, a_tag_that_is_longer_than_a_complete_line_of_the_sheet, red hair"
    lines = FONT.wrapped(text, 100, 9)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert max(map(FONT.length, lines)) <= 100
    cut = FONT.wrapped(text, 100, 2)
    assert (len(cut), cut[0]) == (2, lines[0])
    assert cut[1].endswith(ELLIPSIS)
    assert FONT.length(cut[1]) <= 100
    assert FONT.wrapped("", 100, 2) == []
    assert FONT.wrapped("w", 1, 2) == ["w"], "a character is never cut"
