"""The routes below /api/jobs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from spectune.studio.workspace import Workspace


@pytest.fixture
def model(workspace: Workspace, tiny_checkpoint: Path) -> str:
    return str(shutil.copy(tiny_checkpoint, workspace.models[0] / "tiny.safetensors"))


def test_a_job_waits_is_taken_out_and_removed(client: TestClient, workspace: Workspace, model: str) -> None:
    wanted = {"command": "inspect", "values": {"model": model}, "title": "Look\x1b at it"}
    job = client.post("/api/jobs", json=wanted).json()
    assert (job["state"], job["title"]) == ("queued", "Look\N{REPLACEMENT CHARACTER} at it")
    assert (job["argv"], job["cwd"]) == (["inspect", "--", model], str(workspace.output))
    assert client.get("/api/jobs").json()["jobs"] == [job]
    path = f"/api/jobs/{job['id']}"
    assert client.get(path).json() == job
    assert client.get(f"{path}/events?after=0").json() == {"events": [], "next": 0, "state": "queued"}
    assert client.get(f"{path}/log").json() == {"text": "", "next": 0, "state": "queued"}
    assert client.post(f"{path}/stop").json()["state"] == "stopped"
    assert client.get(f"{path}/events").json()["events"][-1]["exit_code"] == 130
    assert client.post(f"{path}/remove").json() == {"removed": job["id"]}
    assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    ("command", "values", "status", "what"),
    [
        ("studio", {"host": "0.0.0.0"}, 422, "no job `studio`"),
        ("inspect", {"model": "/etc/passwd"}, 404, "outside of the folders"),
        ("inspect", {"model": "{}", "progress": "os.system"}, 422, "unknown option `progress`"),
        ("split", {"model": "{}", "rank": -1}, 422, "--rank"),
        ("x" * 101, {}, 422, "command"),
    ],
)
def test_what_is_refused_is_an_error_and_no_job(
    client: TestClient, model: str, command: str, values: dict[str, object], status: int, what: str
) -> None:
    values = {name: model if value == "{}" else value for name, value in values.items()}
    reply = client.post("/api/jobs", json={"command": command, "values": values})
    assert reply.status_code == status
    assert what in reply.json()["error"]["what"]
    assert client.get("/api/jobs").json() == {"jobs": []}


@pytest.mark.parametrize(
    "path", ["none", "..%2f..%2fetc", "20261129-004512-abcdef/events", "20261129-004512-abcdef/log"]
)
def test_there_is_no_such_job(client: TestClient, path: str) -> None:
    assert client.get(f"/api/jobs/{path}").status_code == 404
    assert client.get("/api/jobs/none/events?after=-1").status_code == 422
    assert client.post("/api/jobs/none/explode").status_code == 422


def test_other_sites_start_nothing(client: TestClient, model: str) -> None:
    headers = {"sec-fetch-site": "cross-site", "origin": "https://example.com"}
    reply = client.post("/api/jobs", json={"command": "inspect", "values": {"model": model}}, headers=headers)
    assert reply.status_code == 403
    assert client.get("/api/jobs").json() == {"jobs": []}


def test_a_recipe_with_errors_is_no_job(
    client: TestClient, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The assistant checks the recipe: its keys, and that its paths are in the folders."""
    recipe = workspace.data[0] / "r.toml"
    recipe.write_text("[run]\noutput = '/etc'\n", encoding="utf-8")
    asked: list[tuple[str, object]] = []

    def ask(question: str, values: dict[str, object], **more: object) -> dict[str, object]:
        asked.append((question, values))
        problem = {"key": "run.output", "what": "/etc is outside of the folders", "hint": "add it"}
        return {"recipe_values": {"values": {"run": {}}}, "check": {"problems": [problem]}}[question]

    monkeypatch.setattr(workspace, "ask", ask)
    reply = client.post("/api/jobs", json={"command": "train", "values": {"recipe": str(recipe)}})
    assert reply.status_code == 422
    error = {"what": "r.toml: run.output: /etc is outside of the folders", "hint": "add it"}
    assert reply.json()["error"] == error
    assert asked[0] == ("recipe_values", {"path": str(recipe)})
    assert client.get("/api/jobs").json() == {"jobs": []}
