"""Training with `spectune.train`, as scripts and notebooks call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import spectune
from tests.training.conftest import MakeRecipe


class Steps(spectune.Callbacks):
    def __init__(self) -> None:
        self.count = 0

    def on_step(self, info: Any) -> None:
        self.count += 1


def test_a_dict_is_trained_with_progress_callbacks_and_previews(
    make_recipe: MakeRecipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = make_recipe().model_dump(exclude_unset=True)
    recipe["run"] |= {"output": "here", "preview_every_steps": 1}
    steps = Steps()
    report = spectune.train(recipe, callbacks=(steps,), overrides=("run.steps=1",))
    assert (report.steps, steps.count) == (1, 1)
    assert (tmp_path / "here" / "t.safetensors").is_file()
    assert list((tmp_path / "here" / "previews").rglob("*.png"))
    captured = capsys.readouterr()
    assert "step 1/1, 0:00:00 left, loss" in captured.err
    assert captured.out == ""


def test_a_recipe_is_trained_in_silence(make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(run={"steps": 1})
    assert isinstance(recipe, spectune.Recipe)
    assert spectune.train(recipe, show_progress=False).steps == 1
    assert capsys.readouterr().err == ""


def test_other_objects_are_refused() -> None:
    class Other(BaseModel):
        pass

    with pytest.raises(
        spectune.InputError, match="`recipe` is of type Other: expected a path, a dict or a Recipe"
    ):
        spectune.train(Other())
