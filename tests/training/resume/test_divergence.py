from __future__ import annotations

from pathlib import Path

import pytest

from spectune.errors import SpectuneError
from spectune.training.loop import train
from spectune.training.resume.divergence import divergence_hint, sound_states
from tests.training.conftest import MakeRecipe

STATES = [Path(f"t-step0000000{step}.state") for step in (2, 4, 6)]


def test_states_with_broken_weights_are_found() -> None:
    losses = {1: 0.1, 2: 0.2, 3: 0.1, 4: 0.2, 5: 90.0, 6: 95.0, 7: 90.0}
    assert sound_states(STATES, losses, failed_step=8) == STATES[:1]
    assert sound_states(STATES, dict.fromkeys(range(1, 8), 0.1), failed_step=8) == STATES
    assert sound_states(STATES, dict.fromkeys(range(1, 7), 0.1), failed_step=7) == STATES[:2]


def test_the_hint_names_lower_rates_and_the_state(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(optimizer={"learning_rate": 0.5, "part_learning_rates": {"unet": 0.2}})
    hint = divergence_hint(recipe, STATES, STATES[:2])
    assert hint.startswith("first remove t-step00000006.state, which have broken weights; ")
    assert "`overrides` optimizer.learning_rate=0.05" in hint
    assert "`overrides` optimizer.part_learning_rates.unet=0.02" in hint
    assert hint.endswith("it resumes from t-step00000004.state")
    assert "there is no saved state, so the run starts again" in divergence_hint(recipe, [], [])
    assert "`force` `overrides` run.resume=false; the run starts" in divergence_hint(recipe, STATES, [])


def test_a_run_that_diverged_continues_as_its_hint_says(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    high = make_recipe(optimizer={"learning_rate": 1e9}, run={"save_every_steps": 1})
    with pytest.raises(SpectuneError, match=r"is (nan|inf); the step was not saved") as caught:
        train(high)
    assert "`overrides` optimizer.learning_rate=1e+08 `force` `overrides` run.resume=false" in str(
        caught.value.hint
    )
    assert train(make_recipe(run={"resume": False}), force=True).steps == 3


@pytest.mark.parametrize("name", ["prodigy", "prodigy_plus_schedule_free", "dadapt_adam"])
def test_optimizers_with_their_own_step_size_start_again(make_recipe: MakeRecipe, name: str) -> None:
    recipe = make_recipe(optimizer={"name": name, "learning_rate": ...})
    hint = divergence_hint(recipe, STATES, [])
    assert "with `force` `overrides` run.resume=false `overrides` optimizer.options." in hint
    assert "learning_rate" not in hint
