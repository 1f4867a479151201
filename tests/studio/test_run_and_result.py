"""The pages Run and Result: the files of a training, and the jobs that build its result."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from spectune.studio.app import create_app
from spectune.studio.jobs.records import JobRecord
from spectune.studio.workspace import Workspace

TRAINING, OTHER = "20260101-120000-aaaaaa", "20260101-120000-bbbbbb"
RECIPE = """
[model]
base = "../models/base.safetensors"
parts = ["unet", "te1"]
[data]
resolution_px = 512
[run]
name = "a[b]"
output = "runs/a"
preview = "a.prompts.txt"
"""


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    """Return a Studio with one training, which has two saves and a result."""
    home, output = tmp_path / "home", tmp_path / "out"
    for folder in ("runs/a/previews/a[b]-step00000020", "runs/a/previews/a[b]-step00000020"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    for name in ("a[b].safetensors", "a[b]-step00000010.safetensors", "a[b]-step00000020.safetensors"):
        (output / "runs/a" / name).write_bytes(b"x")
    (output / "runs/a/previews/a[b]-step00000020/1.png").write_bytes(b"x")
    (output / "a.toml").write_text(RECIPE)
    (output / "a.prompts.txt").write_text("# prompts\na cat --d 1\na dog\n")
    recipe = str(output / "a.toml")
    for job, command, values in ((TRAINING, "train", {"recipe": recipe}), (OTHER, "doctor", {})):
        folder = home / "jobs" / job
        folder.mkdir(parents=True)
        record = JobRecord(
            id=job, title="a <b>", command=command, values=values, argv=[command, *values.values()],
            cwd=str(home), created=1.0, queued=1.0, outputs=[],
        )  # fmt: skip
        record.write(folder / JobRecord.FILE)
    models = tmp_path / "models"
    models.mkdir()
    return Workspace(home, models=(models,), default_output=output)


@pytest.fixture
def client(space: Workspace) -> TestClient:
    headers = {"origin": "http://127.0.0.1:7861", "sec-fetch-site": "same-origin"}
    return TestClient(create_app(space), base_url="http://127.0.0.1:7861", headers=headers)


def planned(client: TestClient, kind: str, **parts: Any) -> dict[str, Any]:
    reply = client.post(f"/api/results/{TRAINING}/plan", json={"kind": kind, "parts": parts})
    return {"status": reply.status_code, **reply.json()}


@pytest.mark.parametrize("page", ["runs", "results"])
def test_pages_show_escaped_titles_and_refuse_other_jobs(client: TestClient, page: str) -> None:
    assert "a &lt;b&gt;" in client.get(f"/{page}/{TRAINING}").text
    for other in ("20260101-120000-cccccc", "3", "a%2Fb", ".hidden", "a b. "):
        assert client.get(f"/{page}/{other}").status_code == 404


def test_the_files_of_a_training(client: TestClient, space: Workspace) -> None:
    found = client.get(f"/api/results/{TRAINING}/files").json()
    assert [one["step"] for one in found["saves"]] == [10, 20]
    assert [(one["step"], len(one["files"])) for one in found["previews"]] == [(20, 1)]
    assert (found["parts"], found["prompts"]) == (["unet", "te"], ["a cat", "a dog"])
    assert (found["built"], found["compare"]) == ([], None)
    for name in ("a[b]-lora.safetensors", "a[b]-te10-compare.png", "other-lora.safetensors"):
        (space.output / "runs/a" / name).write_bytes(b"x")
    made = client.get(f"/api/results/{TRAINING}/files").json()
    assert [(one["kind"], Path(one["path"]).name) for one in made["built"]] == [
        ("lora", "a[b]-lora.safetensors")
    ]
    assert Path(made["compare"]).name == "a[b]-te10-compare.png"
    assert found["tuned"] == str(space.output / "runs/a/a[b].safetensors")
    assert client.get(f"/api/runs/{TRAINING}/files").json()["recipe"] == str(space.output / "a.toml")
    assert client.get(f"/api/runs/{OTHER}/files").status_code == 404  # trains nothing


def test_files_outside_of_the_folders_are_refused(client: TestClient, space: Workspace) -> None:
    recipe = space.output / "a.toml"
    recipe.write_text(RECIPE.replace("../models/base.safetensors", "/etc/passwd"))
    assert client.get(f"/api/results/{TRAINING}/files").status_code == 404
    recipe.write_text("[model]\n")
    assert (
        "cannot be found with its recipe"
        in client.get(f"/api/results/{TRAINING}/files").json()["error"]["what"]
    )


def test_the_checkpoint_is_built_from_the_last_step(client: TestClient, space: Workspace) -> None:
    folder, base = space.output / "runs/a", str(space.models[0] / "base.safetensors")
    target = folder / "a[b]-checkpoint.safetensors"
    plan = planned(client, "checkpoint")
    values = {"base": base, "adapter": str(folder / "a[b].safetensors"), "out": str(target), "force": False}
    assert plan["jobs"] == [{"command": "rebuild", "values": values}]
    target.write_bytes(b"built")
    assert planned(client, "checkpoint")["jobs"] == []  # newer than the result
    os.utime(target, (1, 1))
    assert planned(client, "checkpoint")["jobs"][0]["values"]["force"] is True


def test_saves_and_strengths_are_sliced_into_one_adapter_first(client: TestClient, space: Workspace) -> None:
    folder = space.output / "runs/a"
    plan = planned(client, "lora", unet={"strength": 0.8}, te={"step": 10})
    cut, made = plan["jobs"]
    assert cut["values"]["slices"] == [
        f"{folder}/a[b]-step00000010.safetensors:te:1",
        f"{folder}/a[b].safetensors:unet:0.8",
    ]
    mixed = f"{folder}/a[b]-te10-unetx0.8.safetensors"
    assert (cut["values"]["out"], made["command"], made["values"]["tuned"]) == (mixed, "export", mixed)
    assert plan["target"] == f"{folder}/a[b]-te10-unetx0.8-lora.safetensors"
    without = planned(client, "checkpoint", te={"strength": 0})["jobs"][0]["values"]
    assert without["slices"] == [f"{folder}/a[b].safetensors:unet:1"]


def test_a_comparison_has_the_same_prompts_for_both(client: TestClient, space: Workspace) -> None:
    (job,) = planned(client, "compare")["jobs"]
    base = str(space.models[0] / "base.safetensors")
    assert job["values"]["models"] == [base, f"{base}+{space.output}/runs/a/a[b].safetensors"]
    assert (job["values"]["captions"], job["values"]["size"]) == (["a cat", "a dog"], "512")


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ({"unet": {"strength": 0}, "te": {"strength": 0}}, "nothing would change"),
        ({"unet": {"step": 30}}, "there is no save of step 30"),
        ({"unet": {"strength": 9}}, "less than or equal to 3"),
    ],
)
def test_choices_without_a_result_are_errors(client: TestClient, parts: dict[str, Any], what: str) -> None:
    plan = planned(client, "checkpoint", **parts)
    assert (plan["status"], what in plan["error"]["what"]) == (422, True)
