"""The recipe page: open, edit, check and save."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from spectune.studio.app import create_app
from spectune.studio.workspace import Workspace

SAME = {"sec-fetch-site": "same-origin"}


@pytest.fixture
def space(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """Return a workspace whose questions are answered in this process."""
    from spectune.studio.assistant import questions

    made = Workspace(tmp_path / "home", models=(tiny_checkpoint.parent,), default_output=tmp_path / "output")

    def ask(question: str, values: Mapping[str, Any], *, topic: str | None = None) -> Any:
        return questions.reply(question, values, [str(root) for root in made.places().roots])

    monkeypatch.setattr(made, "ask", ask)
    return made


@pytest.fixture
def client(space: Workspace) -> TestClient:
    return TestClient(create_app(space), base_url="http://127.0.0.1", headers=SAME)


def test_a_preset_keeps_its_settings_and_leaves_the_files_to_the_user(client: TestClient) -> None:
    listed = {one["name"]: one["about"] for one in client.get("/api/recipe/files").json()["presets"]}
    assert listed["emoji3d_flow"].startswith("From noise prediction to flow matching")
    opened = client.post("/api/recipe/open", json={"preset": "emoji3d_flow"}).json()
    assert opened["values"]["loss"] == {"kind": "fft"}
    assert "base" not in opened["values"]["model"]
    assert "d_coef = 1.0\n" in opened["text"]
    missing = client.post("/api/recipe/check", json={"values": opened["values"], "quick": True}).json()
    assert {one["key"] for one in missing["problems"]} == {"model", "data", "run.name", "run.output"}
    assert client.post("/api/recipe/open", json={"preset": "../secret"}).status_code == 422


def test_text_and_form_are_the_same_recipe(client: TestClient) -> None:
    text = '[model]\nrank = 8\n[[data.sets]]\npath = "a"\n'
    values = client.post("/api/recipe/open", json={"text": text}).json()["values"]
    assert values["model"] == {"rank": 8}
    values["model"]["rank"] = -1
    assert "rank = -1 # Split" in client.post("/api/recipe/text", json={"values": values}).json()["text"]
    wrong = client.post("/api/recipe/open", json={"text": "[model\n"})
    assert wrong.status_code == 422
    assert "not valid TOML" in wrong.json()["error"]["what"]


def test_a_kohya_command_is_converted_with_a_verdict_for_each_flag(client: TestClient) -> None:
    command = (
        "accelerate launch sdxl_train_network.py --pretrained_model_name_or_path=m --network_dim=32 --foo=3"
    )
    opened = client.post("/api/recipe/open", json={"command": command}).json()
    assert opened["values"]["model"]["rank"] == 32
    assert ("--foo=3", "unknown") in [(one["flag"], one["verdict"]) for one in opened["flags"]]


def test_a_recipe_is_saved_once_and_listed(client: TestClient, space: Workspace) -> None:
    form = {"values": {"model": {"rank": 8}}, "name": "style"}
    path = Path(client.post("/api/recipe/save", json=form).json()["path"])
    assert path == space.output / "recipes" / "style.toml"
    assert "rank = 8" in path.read_text(encoding="utf-8")
    assert client.get("/api/recipe/files").json()["recipes"] == [str(path)]
    again = client.post("/api/recipe/save", json=form)
    assert again.status_code == 422
    assert again.json()["error"]["what"] == "style.toml exists"
    assert client.post("/api/recipe/save", json={**form, "overwrite": True}).status_code == 200
    assert sorted(one.name for one in path.parent.iterdir()) == ["style.toml"]
    for name in ("../up", "con", "a/b", ""):
        assert client.post("/api/recipe/save", json={**form, "name": name}).status_code == 404


def test_the_check_opens_the_files_that_a_recipe_names(
    client: TestClient, space: Workspace, tiny_checkpoint: Path
) -> None:
    values = {
        "model": {"base": str(tiny_checkpoint), "rank": 2},
        "data": {"folders": [str(space.output / "none")]},
        "run": {"name": "a", "output": str(space.output / "a"), "steps": 2},
    }
    assert client.post("/api/recipe/check", json={"values": values, "quick": True}).json()["problems"] == []
    (problem,) = client.post("/api/recipe/check", json={"values": values}).json()["problems"]
    assert "none" in problem["what"]
    values["data"]["folders"] = ["/etc"]
    (problem,) = client.post("/api/recipe/check", json={"values": values, "quick": True}).json()["problems"]
    assert problem["key"] == "data.folders"
    assert "outside of the folders" in problem["what"]
