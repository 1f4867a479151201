"""The settings: the file and the page."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from spectune.studio.pages import settings as page
from spectune.studio.settings import Settings, SettingsFile
from spectune.studio.workspace import Workspace


def test_folders_are_added_and_kept(client: TestClient, workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "outside"
    with pytest.raises(Exception, match="outside"):
        workspace.places().inside(str(folder / "a"))
    shown = client.post("/api/settings", json={"models": [str(folder), f' "{folder}" ']}).json()
    assert shown["models"] == [str(folder)]
    assert shown["fixed_models"] == [str(tmp_path / "models")]
    assert workspace.places().inside(str(folder / "a")) == folder / "a"
    assert SettingsFile(workspace.settings.path).now.models == (folder,)
    text = client.get("/settings").text
    assert str(folder) in text
    folder.rmdir()
    assert client.get("/api/settings").json()["missing"] == [str(folder)]
    assert client.post("/api/settings", json={"models": []}).json()["models"] == []


def test_the_output_folder_is_created(client: TestClient, tmp_path: Path) -> None:
    target = tmp_path / "new" / "runs"
    assert client.post("/api/settings", json={"output": str(target)}).json()["output"] == str(target)
    assert target.is_dir()
    (tmp_path / "file").touch()
    error = client.post("/api/settings", json={"output": str(tmp_path / "file")}).json()["error"]
    assert "cannot be created" in error["what"]


def test_a_wrong_folder_is_an_error_with_a_hint(client: TestClient, tmp_path: Path) -> None:
    response = client.post("/api/settings", json={"data": [str(tmp_path / "nothing")]})
    assert response.status_code == 422
    error = response.json()["error"]
    assert error["what"].endswith("nothing is not a folder")
    assert error["hint"] == "paste the full path of a picture folder"


@pytest.mark.parametrize("damage", ["{", "[]", '{"theme": 3}', '{"models": ["\\u0000", 3]}', "\0"])
def test_a_damaged_file_counts_as_empty_with_a_notice(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "settings.json"
    path.write_text(damage, encoding="utf-8")
    made = SettingsFile(path)
    assert made.now == Settings()
    assert "cannot be read" in made.problem
    made.change(theme="dark")
    assert made.problem == ""
    assert SettingsFile(path).now.theme == "dark"


def test_the_theme_is_in_the_page(client: TestClient) -> None:
    assert 'data-theme="auto"' in client.get("/").text
    client.post("/api/settings", json={"theme": "dark"})
    assert 'data-theme="dark"' in client.get("/").text


def test_the_dialog_returns_a_folder(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "choose_folder", lambda title: f"[{title}]")
    reply = client.post("/api/settings/browse", json={"kind": "data"}).json()
    assert reply == {"folder": "[spectune: choose a picture folder]"}
