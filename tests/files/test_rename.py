"""A rename that another program refuses for a moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from spectune.files import rename as module
from spectune.files.rename import rename


class Refusing:
    """Refuses the first renames, as Windows does while a virus scanner has the file open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.left, self.pauses, plain = times, 0, Path.replace

        def replace(path: Path, target: Path) -> Path:
            if self.left:
                self.left -= 1
                raise PermissionError(13, "The process cannot access the file")
            return plain(path, target)

        monkeypatch.setattr(Path, "replace", replace)
        monkeypatch.setattr(module.time, "sleep", self.pause)

    def pause(self, seconds: float) -> None:
        self.pauses += 1


def test_a_rename_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")
    refusing = Refusing(monkeypatch, 1)
    rename(tmp_path / "a", tmp_path / "b")
    assert refusing.pauses == 1
    assert (tmp_path / "b").read_text() == "new"


def test_a_rename_that_stays_refused_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("new")
    refusing = Refusing(monkeypatch, 100)
    with pytest.raises(PermissionError):
        rename(tmp_path / "a", tmp_path / "b")
    assert refusing.pauses == 5
    assert (tmp_path / "a").is_file()
