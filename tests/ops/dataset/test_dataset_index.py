from __future__ import annotations

import json
from pathlib import Path

import pytest

import spectune
from spectune.cli.app import run
from spectune.errors import InputError
from spectune.training.data.tables.index_file import INDEX_NAME
from tests.training.conftest import draw


def test_an_index_of_each_folder_is_written_and_updated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path / "2_cat" / "a.png")
    draw(tmp_path / "dog" / "b.png")
    (tmp_path / "2_cat" / "torn.png").write_bytes(b"\x89PNG")
    assert run(["dataset", "index", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert f"{tmp_path / '2_cat' / INDEX_NAME}: 1 image, 0.0 MB; 2 added, 0 changed, 0 removed" in shown.err
    assert "1 image skipped: torn.png is not an image that Pillow can read" in shown.err
    assert "1 folder ignored, not named `N_name`: dog" in shown.err
    draw(tmp_path / "2_cat" / "c.png")
    (report,) = spectune.dataset_index((tmp_path,)).folders
    assert (report.images, report.added, report.changed, report.removed) == (2, ("c.png",), (), ())
    (tmp_path / "2_cat" / INDEX_NAME).write_bytes(b"x")
    assert run(["dataset", "index", str(tmp_path), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["folders"][0]["images"] == 2
    assert "the index is made again" in shown.err


def test_a_folder_without_pictures_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no picture or tar file in "):
        spectune.dataset_index((tmp_path,))
