"""Generator of the pages that are made from code: python dev.py docs --write."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
# Text above this line is written by hand, text below it is generated. A page without it is all generated.
MARKER = "<!-- Generated below this line by `python dev.py docs --write`. -->\n"

# Each generated page, and the function that returns its generated text.
PAGES: dict[str, str] = {
    "concepts/evidence.md": "experiments.page:text",
    "reference/commands.md": "docs.operations:commands_page",
    "reference/kohya-flags.md": "docs.kohya_flags:flags_page",
    "reference/recipe-keys.md": "docs.recipe_keys:recipe_reference",
}


def generated(page: str) -> str:
    """Return the whole text of a page in PAGES, with its generated part up to date."""
    module, _, function = PAGES[page].partition(":")
    text = getattr(importlib.import_module(module), function)()
    path = DOCS / page
    above, marker, _ = path.read_text(encoding="utf-8").partition(MARKER) if path.exists() else ("", "", "")
    return f"{above}{marker}\n{text}" if marker else text


def write() -> None:
    """Write every page in PAGES."""
    for page in PAGES:
        (DOCS / page).write_text(generated(page), encoding="utf-8")
        print(f"wrote {page}")


if __name__ == "__main__":
    sys.path.insert(0, str(DOCS.parent))
    write()
