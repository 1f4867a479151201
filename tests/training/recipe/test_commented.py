"""Names of files in a written recipe: a stranger chose them."""

from __future__ import annotations

import tomllib

import pytest

from spectune.errors import InputError
from spectune.training.recipe.commented import Setting, commented_recipe

ESCAPE = "caf\x1b[2J\u202e"


def test_control_characters_of_names_stay_out_of_comments() -> None:
    text = commented_recipe(
        [Setting("run.name", "a", f"from {ESCAPE}")], head=f"from {ESCAPE}\nline 2", remarks={}
    )
    assert tomllib.loads(text) == {"run": {"name": "a"}}
    assert not set(text) & {"\x1b", "\u202e"}
    assert "# line 2" in text


def test_a_name_that_is_not_unicode_is_an_error() -> None:
    with pytest.raises(InputError, match=r"the name in model\.base is not Unicode"):
        commented_recipe([Setting("model.base", "caf\udce9.safetensors", "")], head="", remarks={})
