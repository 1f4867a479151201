"""The generated pages of the documentation are up to date."""

from __future__ import annotations

import pytest

from docs.generate import DOCS, MARKER, PAGES, generated


# tests/experiments compares the evidence page, without redrawing its figures
@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"concepts/evidence.md"}))
def test_generated_pages_are_up_to_date(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert text == generated(page), "run: python dev.py docs --write"
    assert text.count(MARKER) <= 1
