"""`spectune dataset`: counts, problems, the sheet, and output that is safe to print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import spectune
from spectune.cli.app import run
from spectune.errors import InputError
from spectune.ops.dataset import near_duplicates
from spectune.ops.dataset.records import DatasetReport, count_tags


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a sharp picture."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder with one picture of each kind."""
    folder = tmp_path / "pictures" / "3_cat"
    folder.mkdir(parents=True)
    noise(64, 64).save(folder / "a.png")
    (folder / "a.txt").write_text("cat, red fur", encoding="utf-8")
    noise(64, 64).save(folder / "b copy.png")
    (folder / "b copy.txt").write_text("cat, " + "red fur, " * 60, encoding="utf-8")
    noise(120, 60, seed=1).save(folder / "wide.png")  # the nearest of 32..128 is 96x40, in steps of 8
    (folder / "wide.txt").write_text("", encoding="utf-8")
    noise(16, 16, seed=2).save(folder / "tiny.png")
    Image.new("RGB", (64, 64), "gray").save(folder / "evil\x1b[31m\x07.png")
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n")
    return folder.parent


def report_of(folder: Path, **options: Any) -> DatasetReport:
    return spectune.dataset((folder,), resolution_px=64, **options)


def test_counts_and_problems(pictures: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in pictures.rglob("*")}
    report = report_of(pictures)
    assert {path: path.stat().st_mtime_ns for path in pictures.rglob("*")} == before
    assert (len(report.pictures), report.draws, report.captioned) == (5, 15, 2)
    assert report.longer_captions == {75: 1, 150: 1, 225: 0}
    assert dict(report.tags)["cat"] == 4  # two captions, and the name of the folder twice
    lines = [problem.text + ": " + "; ".join(problem.items) for problem in report.problems]
    for part in (
        "1 picture to be enlarged more than 1.5 times: 3_cat/tiny.png: 4.0 times, from 16x16",
        "evil",
        "bad.png",
        "1 group of near duplicates: at most 4 of 64 bits of their perceptual hashes differ: "
        "3_cat/a.png, 3_cat/b copy.png",
    ):
        assert [line for line in lines if part in line], part
    assert report_of(pictures) == report


def test_sizes_and_crops_are_those_of_training(tmp_path: Path) -> None:
    folder = tmp_path / "1_x"
    folder.mkdir()
    noise(1920, 1080).save(folder / "film.png")
    report = spectune.dataset((tmp_path,))
    (picture,) = report.pictures
    target = picture.placement.target
    assert (target.width, target.height) == (1344, 768)
    # 1920x1080 covers 1344x768 as 1365x768
    assert report.cropped == pytest.approx(1 - 1344 / 1365)
    assert picture.enlarged == pytest.approx(1365 / 1920)


def test_no_upscale_keeps_the_size_of_small_pictures(tmp_path: Path) -> None:
    noise(520, 300).save(tmp_path / "small.png")
    (picture,) = spectune.dataset((tmp_path,), no_upscale=True).pictures
    target = picture.placement.target
    assert (target.width, target.height, picture.enlarged) == (512, 256, 1)


def test_the_sheet_shows_the_worst_first_and_cropped_parts_in_red(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "1_x"
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64), "white").save(folder / "a.png")
    Image.new("RGB", (640, 20), "white").save(folder / "b.png")
    target = tmp_path / "new" / "sheet.png"
    report = report_of(tmp_path / "in", sheet=target)
    assert report.shown == 2
    with Image.open(target) as sheet:
        first, second = sheet.crop((8, 8, 200, 200)), sheet.crop((208, 8, 400, 200))
        reds = [int(((np.asarray(cell) @ [1, -1, 0]) > 100).sum()) for cell in (first, second)]
    assert report.pictures[1].placement.cropped_share > 0.5
    assert reds[0] > 300
    assert reds[1] == 0
    with pytest.raises(InputError, match="exists"):
        report_of(tmp_path / "in", sheet=target)


def test_without_imagehash_the_report_says_so(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(near_duplicates, "_imagehash", lambda: None)
    assert run(["dataset", str(pictures), "--resolution", "64"]) == 0
    text = capsys.readouterr().err
    assert "near duplicates were not looked for" in text
    assert 'pip install "spectune[dataset]"' in text
    assert report_of(pictures).near_duplicates is None


def test_text_has_no_control_characters_and_bounded_lists(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(8):
        noise(8, 8, seed=10 + number).save(pictures / "3_cat" / f"small{number}.png")
    assert run(["dataset", str(pictures), "--resolution", "64"]) == 0
    text = capsys.readouterr().err
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "9 pictures to be enlarged more than 1.5 times" in text
    assert "    ... 4 more\n" in text
    assert "13 pictures, 39 draws per epoch" in text


def test_json_lists_every_picture(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["dataset", str(pictures), "--resolution", "64", "--json"]) == 0
    printed = capsys.readouterr().out
    record = json.loads(printed)
    assert [Path(one["path"]).name for one in record["pictures"]][:2] == ["a.png", "b copy.png"]
    assert record["pictures"][0]["bucket"] == [64, 64]
    assert [Path(path).name for path in record["near_duplicates"][0]] == ["a.png", "b copy.png"]
    assert run(["dataset", str(pictures), "--resolution", "64", "--json"]) == 0
    assert capsys.readouterr().out == printed


def test_a_folder_without_pictures_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["dataset", str(tmp_path)]) == 2
    assert "no usable image" in capsys.readouterr().err


def test_tags_are_counted_once_per_caption() -> None:
    assert count_tags(["b, a, a", "a,c", "", " , "]) == [("a", 2), ("b", 1), ("c", 1)]
