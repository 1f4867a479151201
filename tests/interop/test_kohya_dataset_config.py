"""Test that a --dataset_config becomes [[data.sets]], and that settings which differ are reported."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from spectune.cli.app import run
from spectune.training.recipe.file import load_recipe
from tests.interop.kohya_commands import SHORT

CONFIG = """
[general]
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 1
[[datasets]]
resolution = [768, 768]
batch_size = 3
enable_bucket = true
min_bucket_reso = 256
max_bucket_reso = 1536
  [[datasets.subsets]]
  image_dir = "img"
  num_repeats = 4
  class_tokens = "a cat"
  flip_aug = true
  [[datasets.subsets]]
  image_dir = 'C:\\reg'
  is_reg = true
  flip_aug = true
"""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def imported(config: str, flags: str = "") -> int:
    Path("d.toml").write_text(config)
    return run(["recipe", "import", f"{SHORT} --dataset_config d.toml {flags}", "--force"])


def test_subsets_become_sets(capfd: pytest.CaptureFixture[str]) -> None:
    assert imported(CONFIG, "--train_batch_size=1 --resolution=512") == 0
    text = Path("recipe.toml").read_text()
    assert text.count("[[data.sets]]") == 2
    data = tomllib.loads(text)
    assert data["data"]["sets"] == [
        {"path": "img", "repeats": 4, "caption": "a cat"},
        {"path": "C:\\reg", "repeats": 1, "regularisation": True},
    ]
    assert "folders" not in data["data"]
    assert data["data"]["resolution_px"] == 768
    assert data["data"]["flip_probability"] == 0.5
    assert data["data"]["bucket"] == {"enabled": True, "min_px": 256, "max_px": 1536, "step_px": 64}
    assert data["data"]["caption"] == {"extensions": [".txt"], "shuffle": True, "keep_tokens": 1}
    assert data["run"]["batch"] == 3
    assert "dropped: --train_batch_size: the dataset config replaces it" in capfd.readouterr().err
    assert load_recipe(Path("recipe.toml")).data.sets[0].repeats == 4


def test_a_setting_that_differs_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    other = '[[datasets]]\nresolution = 1024\n[[datasets.subsets]]\nimage_dir = "b"\nkeep_tokens = 2\n'
    assert imported(CONFIG + other) == 1
    output = capfd.readouterr().err
    for line in (
        "--dataset_config resolution=768,768 1024: not supported: all images have one value",
        "--dataset_config keep_tokens=1 2: not supported",
        "--dataset_config flip_aug=on default: not supported",
    ):
        assert line in output
    assert tomllib.loads(Path("recipe.toml").read_text())["data"]["resolution_px"] == 768


def test_subsets_that_spectune_cannot_read_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    config = """[[datasets]]
    [[datasets.subsets]]
    image_dir = "a"
    metadata_file = "meta.json"
    [[datasets.subsets]]
    image_dir = "b"
    num_repeats = 0
    no_such_key = 1
    """
    assert imported(config) == 1
    output = capfd.readouterr().err
    assert "--dataset_config metadata_file=meta.json: not supported: write captions" in output
    assert "--dataset_config image_dir=b: not supported: this subset is left out" in output


def test_a_dataset_config_alone_is_imported_without_a_model(capfd: pytest.CaptureFixture[str]) -> None:
    Path("d.toml").write_text(CONFIG)
    assert run(["recipe", "import", "d.toml"]) == 1
    output = capfd.readouterr().err
    assert "d.toml is a --dataset_config: its subsets become [[data.sets]]; it names no model" in output
    assert "model.base: to fill in" in output
    assert len(load_recipe(Path("recipe.toml")).data.sets) == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[[datasets]]\nresolution = 1", "d.toml has no subset with `image_dir`"),
        ("a = [", "d.toml is not a valid dataset config"),
        ("a = 1", "d.toml is no dataset config: expected [[datasets]]"),
    ],
)
def test_errors(config: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert imported(config) == 2
    assert f"error: {message}" in capfd.readouterr().err


def test_a_file_that_is_missing_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["recipe", "import", f"{SHORT} --dataset_config K:/none.toml"]) == 1
    assert "not supported: the file is not here; its subsets become [[data.sets]]" in capfd.readouterr().err


def test_too_many_subsets_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert imported("[[datasets]]\n" + "[[datasets.subsets]]\nimage_dir = 'a'\n" * 1001) == 2
    assert (
        "d.toml has 1,001 subsets with 0 settings: expected at most 1,000 and 500" in capfd.readouterr().err
    )
