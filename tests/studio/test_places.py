"""Paths of requests."""

from __future__ import annotations

from pathlib import Path

import pytest

from spectune.studio.places import Places, Refused, plain_name, plain_path


@pytest.fixture
def places(tmp_path: Path) -> Places:
    for name in ("models", "pictures", "output", "models-other"):
        (tmp_path / name).mkdir()
    (tmp_path / "models" / "a.safetensors").touch()
    (tmp_path / "models-other" / "b.safetensors").touch()
    return Places((tmp_path / "models",), (tmp_path / "pictures",), tmp_path / "output")


def test_files_and_folders_inside(places: Places, tmp_path: Path) -> None:
    model = tmp_path / "models" / "a.safetensors"
    assert places.file(str(model)) == model
    assert places.folder(str(tmp_path / "pictures")) == tmp_path / "pictures"
    assert (
        places.inside(str(tmp_path / "output" / "new" / "x.toml")) == tmp_path / "output" / "new" / "x.toml"
    )
    with pytest.raises(Refused, match="is not a file"):
        places.file(str(tmp_path / "models"))
    with pytest.raises(Refused, match="is not a folder"):
        places.folder(str(model))
    with pytest.raises(Refused, match="outside"):
        places.file(str(model), roots=places.data)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "a.safetensors",
        "~",
        "/",
        "/etc/passwd",
        "//server/share",
        "\\\\server\\share",
        "C:\\x",
        "hub:a/b",
    ],
)
def test_other_paths_are_refused(places: Places, text: str) -> None:
    with pytest.raises(Refused):
        places.inside(text)


def test_detours_and_neighbours_are_refused(places: Places, tmp_path: Path) -> None:
    root = tmp_path / "models"
    for text in (
        f"{root}/../models-other/b.safetensors",
        f"{root}/x/../a.safetensors",
        f"{root}-other/b.safetensors",
        f"{root}/a.safetensors\0",
        f"{root}/a\n",
        f"{root}/{'a/' * 5000}",
        f"{root}/{'a' * 300}",
    ):
        with pytest.raises(Refused):
            places.file(text)


def test_a_link_that_leads_out_is_refused_with_the_remedy(places: Places, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret", encoding="utf-8")
    (tmp_path / "models" / "link").symlink_to(outside)
    (tmp_path / "models" / "loop").symlink_to(tmp_path / "models" / "loop")
    with pytest.raises(Refused, match=r"is a link to .*outside") as caught:
        places.file(str(tmp_path / "models" / "link" / "secret.txt"))
    assert "Settings" in (caught.value.hint or "")
    with pytest.raises(Refused):
        places.file(str(tmp_path / "models" / "loop"))
    (tmp_path / "models" / "inner").symlink_to(tmp_path / "pictures")
    assert places.folder(str(tmp_path / "models" / "inner")) == tmp_path / "pictures"


@pytest.mark.parametrize(
    "text",
    [
        r"C:relative",
        r"\rooted",
        "models",
        r"\\?\C:\models\a",
        r"\\.\PhysicalDrive0",
        r"C:\models\a.safetensors:stream",
        r"C:\models\NUL",
        r"C:\models\com1.txt",
        r"C:\models\a.",
        "C:\\models\\a ",
        r"C:\models\..\secret",
        "C:/models/../secret",
    ],
)
def test_paths_that_windows_treats_specially_are_refused(text: str) -> None:
    with pytest.raises(Refused):
        plain_path(text, windows=True)


@pytest.mark.parametrize("text", [r"C:\models\a b.safetensors", "d:/models/x", r"\\nas\share\models\a.png"])
def test_plain_paths_of_windows(text: str) -> None:
    """Whether a path on another computer is in one of the folders is decided without opening it."""
    assert plain_path(text, windows=True).is_absolute()


@pytest.mark.parametrize("name", ["fox", "Fuchs 2.1", "狐_v1", "a" * 200])
def test_plain_names(name: str) -> None:
    assert plain_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "a/b",
        "a\\b",
        "a:b",
        "nul",
        "COM1.txt",
        "a.",
        "a ",
        " a",
        "a\0",
        "a\n",
        "a*",
        "狐" * 70,
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(Refused, match="the name"):
        plain_name(name)
