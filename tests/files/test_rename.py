"""Files that are written under a temporary name, and renames that another program refuses for a moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from spectune.files import rename as module
from spectune.files.rename import made_folder, old_path, partial_path, remove_leftovers, rename, replacing


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


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    target.write_text("old")

    def fill() -> None:
        with replacing(target) as partial:
            partial.write_text("ne")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*x.txt'"):
        fill()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("replaced", [False, True])
def test_an_old_folder_returns_unless_the_new_one_has_its_name(
    replaced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill leaves it while a folder is replaced."""
    target = tmp_path / "model"
    for path in (old_path(target), *([target] if replaced else [partial_path(target)])):
        path.mkdir()
        (path / "file").write_text(path.name)
    remove_leftovers(target)
    assert old_path(target).exists()  # of a process that runs
    old = old_path(target).name
    monkeypatch.setattr("psutil.pid_exists", lambda pid: False)
    remove_leftovers(target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "file").read_text() == ("model" if replaced else old)


def test_an_error_leaves_no_empty_folders(tmp_path: Path) -> None:

    def fail(folder: Path, *files: Path) -> None:
        with made_folder(folder):
            for file in files:
                file.write_text("")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail(tmp_path / "a" / "b")
    with pytest.raises(ValueError, match="no"):
        fail(tmp_path / "c" / "d", tmp_path / "c" / "kept")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["c", "kept"]
