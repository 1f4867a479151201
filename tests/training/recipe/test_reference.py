from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Le
from pydantic import BaseModel, Field

from docs.recipe_keys import recipe_reference, type_in_words
from spectune.training.optim.kinds import OPTIMIZERS
from spectune.training.recipe.recipe import Recipe, section_of

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "recipe-keys.md"


def with_subsections(section: type[BaseModel]) -> list[type[BaseModel]]:
    below = [section_of(field.annotation) for field in section.model_fields.values()]
    return [section, *(one for own in below if own is not None for one in with_subsections(own))]


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == recipe_reference(), (
        "the page is out of date; write it with `python dev.py docs --write`"
    )


@pytest.mark.parametrize(
    "section",
    [*with_subsections(Recipe)[1:], *(kind.options for kind in OPTIMIZERS.values())],
    ids=lambda section: section.__name__,
)
def test_every_key_has_a_help_text_of_complete_sentences(section: type[BaseModel]) -> None:
    assert section.__doc__
    for key, field in section.model_fields.items():
        if section_of(field.annotation) is None or key == "sets":
            text = field.description
            assert text, f"{section.__name__}.{key}"
            assert text.endswith("."), f"{section.__name__}.{key}"
            assert text[0].isupper() or text[0] == "`", f"{section.__name__}.{key}"


def test_rows_have_type_range_default_and_help() -> None:
    page = recipe_reference()
    assert (
        "| `rank` | integer 1 to 16,384 or `full` | none | Split the base at this rank when the run starts. "
        in page
    )
    assert "| `flip_probability` | number 0 to 1 | `0` | Probability that an image is mirrored. |" in page
    assert "| `padding` | `zeros` or `reflect` | none |" in page
    assert "| `schedule` | `constant`, `linear`, `cosine`, `cosine_restarts` or `polynomial` |" in page
    assert "| `output` | path | required |" in page
    for heading in ("[model]", "[data.bucket]", "[[data.sets]]", "[loss.edm2]", "[run]"):
        assert f"## `{heading}`\n" in page


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int | None, "integer"),
        (tuple[Path, ...], "list: path"),
        (float | Literal["a"] | None, "number or `a`"),
        (tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]], "pair: number > 0"),
        (Annotated[float, Ge(0), Le(1)], "number 0 to 1"),
        (dict[str, Any], "table"),
        (dict[Literal["a", "b"], float], "table: `a` or `b` = number"),
    ],
)
def test_types_are_those_of_toml(annotation: Any, words: str) -> None:
    assert type_in_words(annotation) == words
