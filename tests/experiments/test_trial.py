"""Arithmetic of the experiments, and the page is generated from the results."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import figures, page, run_all
from experiments.experiment import Experiment, rate_text, spread, table
from experiments.near_full import share_of_gain
from experiments.registry import EXPERIMENTS
from experiments.trial import RESULTS, Outcome, Trial, load

SETS = ("flat", "three_d", "own")  # the base generates the last one


def outcome(*losses: float) -> Outcome:
    return Outcome(tuple((10 * number, loss) for number, loss in enumerate(losses)), 1)


def test_steps_until_a_loss_are_interpolated() -> None:
    result = outcome(1.0, 0.6, 0.2)
    assert result.steps_until(0.4) == pytest.approx(15)
    assert result.steps_until(1.0) == 0
    assert result.steps_until(0.1) is None


def test_the_share_of_the_gain_compares_the_same_seed() -> None:
    shares = share_of_gain([outcome(1, 0.6), outcome(1, 0.7)], [outcome(1, 0.5), outcome(1, 0.6)])
    assert shares == pytest.approx([0.8, 0.75])


def test_the_spread_is_the_sample_deviation() -> None:
    assert f"{spread([1.0, 2.0, 3.0]):.1f}" == "2.0 ± 1.0"


def test_a_table_aligns_its_numbers() -> None:
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_a_rate_at_the_edge_of_its_search_has_a_star() -> None:
    searched = [Trial("e", "plain", rate) for rate in (1e-3, 2e-3, 4e-3)]
    assert rate_text(searched[0], searched) == "0.001*"
    assert rate_text(searched[1], searched) == "0.002"
    assert rate_text(Trial("e", "not searched", 1e-3), searched) == "0.001"


def test_images_are_unpacked_once_before_the_processes_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    events: list[str] = []
    trials = [Trial("e", "new", 1e-3, seed=seed, pictures=pictures) for seed in (1, 2) for pictures in SETS]
    monkeypatch.setattr(run_all, "picture_folder", lambda pictures, work: events.append(pictures))
    monkeypatch.setattr(run_all, "run_one", lambda trial, work: not events.append("run"))
    assert run_all.run_experiment(Experiment("e", (lambda: trials,), dict), tmp_path, 2)
    assert events == ["flat", "three_d", *(["run"] * len(trials))]


def test_a_different_trial_has_a_different_file() -> None:
    one = Trial("e", "plain r4", 1e-3)
    other = Trial("e", "plain r4", 1e-3, overrides={"model": {"rank": 4}})
    assert one.key != other.key
    assert one.key.startswith("plain_r4-0.001-s1-")


def test_every_result_belongs_to_a_finished_trial() -> None:
    known = {trial.file: trial for it in EXPERIMENTS.values() for trial in it.trials()}
    files = sorted(RESULTS.glob("*/*.json"))
    assert files
    for file in files:
        assert file in known, f"{file.name} belongs to no trial"
        if len(load(known[file]).curve) > 1:
            assert load(known[file]).curve[-1][0] == known[file].steps


def test_the_page_is_generated_from_the_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(figures, "IMAGES", tmp_path)
    assert page.text() == page.PAGE.read_text(encoding="utf-8")
    for picture in tmp_path.iterdir():
        assert (page.PAGE.parents[1] / "images" / picture.name).is_file()
