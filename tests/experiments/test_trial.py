"""The experiments' own arithmetic, and that the page is what the results give."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import figures, page, run_all
from experiments.experiment import Experiment, spread, table, told_rate
from experiments.near_full import share_of_gain
from experiments.registry import EXPERIMENTS
from experiments.trial import RESULTS, Outcome, Trial, load

SETS = ("flat", "three_d", "own")  # the base itself draws the last one


def outcome(*losses: float) -> Outcome:
    return Outcome(tuple((10 * number, loss) for number, loss in enumerate(losses)), 1)


def test_steps_until_a_loss_are_read_off_the_curve() -> None:
    found = outcome(1.0, 0.6, 0.2)
    assert found.steps_until(0.4) == pytest.approx(15)
    assert found.steps_until(1.0) == 0
    assert found.steps_until(0.1) is None


def test_the_share_of_the_gain_is_of_the_same_seed() -> None:
    shares = share_of_gain([outcome(1, 0.6), outcome(1, 0.7)], [outcome(1, 0.5), outcome(1, 0.6)])
    assert shares == pytest.approx([0.8, 0.75])


def test_the_spread_is_that_of_a_sample() -> None:
    assert f"{spread([1.0, 2.0, 3.0]):.1f}" == "2.0 ± 1.0"


def test_a_table_aligns_its_figures() -> None:
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_a_rate_at_the_edge_of_its_search_has_a_star() -> None:
    searched = [Trial("e", "plain", rate) for rate in (1e-3, 2e-3, 4e-3)]
    assert told_rate(searched[0], searched) == "0.001*"
    assert told_rate(searched[1], searched) == "0.002"
    assert told_rate(Trial("e", "not searched", 1e-3), searched) == "0.001"


def test_pictures_are_unpacked_once_before_the_processes_begin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    happened: list[str] = []
    trials = [Trial("e", "new", 1e-3, seed=seed, pictures=pictures) for seed in (1, 2) for pictures in SETS]
    monkeypatch.setattr(run_all, "picture_folder", lambda pictures, work: happened.append(pictures))
    monkeypatch.setattr(run_all, "run_one", lambda trial, work: not happened.append("run"))
    assert run_all.run_experiment(Experiment("e", (lambda: trials,), dict), tmp_path, 2)
    assert happened == ["flat", "three_d", *(["run"] * len(trials))]


def test_a_trial_that_differs_has_another_file() -> None:
    one = Trial("e", "plain r4", 1e-3)
    other = Trial("e", "plain r4", 1e-3, overrides={"model": {"rank": 4}})
    assert one.key != other.key
    assert one.key.startswith("plain_r4-0.001-s1-")


def test_every_result_belongs_to_a_trial_and_ran_to_its_end() -> None:
    known = {trial.file: trial for it in EXPERIMENTS.values() for trial in it.trials()}
    files = sorted(RESULTS.glob("*/*.json"))
    assert files
    for file in files:
        assert file in known, f"{file.name} is of no trial"
        if len(load(known[file]).curve) > 1:
            assert load(known[file]).curve[-1][0] == known[file].steps


def test_the_page_is_what_the_results_give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(figures, "IMAGES", tmp_path)
    assert page.text() == page.PAGE.read_text(encoding="utf-8")
    for picture in tmp_path.iterdir():
        assert (page.PAGE.parents[1] / "images" / picture.name).is_file()
