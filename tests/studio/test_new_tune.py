"""The page New tune: what it finds, what it checks, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from spectune.studio import finding, runs
from spectune.studio.app import create_app
from spectune.studio.jobs.records import JobRecord
from spectune.studio.workspace import Workspace

UNET, LABEL = "model.diffusion_model.x", "model.diffusion_model.label_emb.0.0.weight"
ENCODERS = ("conditioner.embedders.0.a", "conditioner.embedders.1.a")


def header_file(path: Path, *keys: str, **metadata: str) -> Path:
    header: dict[str, Any] = {key: {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]} for key in keys}
    data = json.dumps({"__metadata__": metadata, **header}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    return path


def draw(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (600, 300), "red").save(path)
    return path


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    header_file(tmp_path / "models/base.safetensors", UNET, LABEL, *ENCODERS)
    draw(tmp_path / "data/toys/1_toys/one.png")
    return Workspace(
        tmp_path / "home",
        models=(tmp_path / "models",),
        data=(tmp_path / "data",),
        default_output=tmp_path / "out",
    )


@pytest.fixture
def asked(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replace the assistant: `asked[question]` becomes the values, `asked["problems"]` is what it finds."""
    seen: dict[str, Any] = {"problems": []}

    def ask(question: str, values: dict[str, Any], *, topic: str | None = None) -> Any:
        seen[question] = values
        if question == "check":
            return {"problems": seen["problems"], "forecast": None}
        if question == "recipe_text":
            return {"text": json.dumps(values["values"])}
        prompts = Path(values["out"]).with_suffix(".prompts.txt")
        run = {"name": values["name"], "preview": str(prompts)}
        return {
            "values": {"run": run, "model": {"rank": 64}, "data": {"resolution_px": 1024}},
            "text": "the recipe\n", "prompts": ["a cat", "a dog"], "prompts_path": str(prompts),
            "pictures": 1, "steps": 500, "notes": [], "warnings": [],
        }  # fmt: skip

    monkeypatch.setattr(space, "ask", ask)
    return seen


@pytest.fixture
def client(space: Workspace) -> TestClient:
    headers = {"origin": "http://127.0.0.1:7861", "sec-fetch-site": "same-origin"}
    return TestClient(create_app(space), base_url="http://127.0.0.1:7861", headers=headers)


def body(space: Workspace, **values: Any) -> dict[str, Any]:
    return {
        "model": str(space.models[0] / "base.safetensors"),
        "folder": str(space.data[0] / "toys"),
        **values,
    }


def test_only_checkpoints_are_found_the_newest_first(tmp_path: Path) -> None:
    import os

    old = header_file(tmp_path / "deep/old.safetensors", UNET, LABEL, *ENCODERS)
    os.utime(old, (1, 1))
    header_file(tmp_path / "new.safetensors", UNET, LABEL)
    header_file(tmp_path / "lora.safetensors", "lora_unet_x.lora_down.weight")
    header_file(tmp_path / "rest.safetensors", UNET, LABEL, *ENCODERS, **{"spectune.role": "residual"})
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 9)
    found = [(one["name"], one["kind"]) for one in finding.checkpoints([tmp_path])]
    assert found == [("new.safetensors", "SDXL, UNet only"), ("old.safetensors", "SDXL checkpoint")]


def test_folders_of_repeats_count_as_their_parent(tmp_path: Path) -> None:
    for name in ("style/2_a/1.png", "style/10_b/2.png", "flat/3.png", "flat/.hidden/4.png"):
        draw(tmp_path / name)
    found = {one["name"]: one["pictures"] for one in finding.picture_folders([tmp_path])}
    assert found == {"style": 2, "flat": 1}


def test_the_page_and_its_choices(client: TestClient) -> None:
    assert client.get("/new").status_code == 200
    found = client.get("/api/new/choices").json()
    assert [one["name"] for one in found["checkpoints"]] == ["base.safetensors"]
    assert [(one["name"], one["pictures"]) for one in found["folders"]] == [("toys", 1)]


def test_the_recipe_and_its_prompts_are_written_once(
    client: TestClient, space: Workspace, asked: dict[str, Any]
) -> None:
    written = client.post("/api/new/write", json=body(space, rank=32, steps=20)).json()
    assert (asked["new"]["rank"], asked["new"]["steps"]) == (32, 20)
    assert "preview" not in asked["check"]["values"]["run"]  # the file of the prompts did not exist yet
    recipe = Path(written["path"])
    assert (recipe, recipe.read_text()) == (space.output / "toys.toml", "the recipe\n")
    assert (space.output / "toys.prompts.txt").read_text() == "a cat --d 1\na dog --d 2\n"
    again = client.post("/api/new/write", json=body(space, name="toys"))
    assert again.status_code == 422
    assert "a tune named toys already" in again.json()["error"]["what"]
    assert client.post("/api/new/write", json=body(space)).json()["name"] == "toys-2"


def test_nothing_is_written_with_a_problem(
    client: TestClient, space: Workspace, asked: dict[str, Any]
) -> None:
    asked["problems"] = [{"key": "", "what": "not enough memory", "hint": "a smaller rank"}]
    checked = client.post("/api/new/check", json=body(space)).json()
    assert checked["problems"] == asked["problems"]
    refused = client.post("/api/new/write", json=body(space))
    assert refused.json() == {"error": {"what": "not enough memory", "hint": "a smaller rank"}}
    assert not space.output.exists()


def test_a_recipe_without_prompts_names_no_file_of_prompts(
    client: TestClient, space: Workspace, asked: dict[str, Any]
) -> None:
    checked = client.post("/api/new/check", json=body(space, prompts=["  ", ""])).json()
    assert json.loads(checked["text"])["run"] == {"name": "toys"}
    own = client.post("/api/new/write", json=body(space, prompts=["a fox --w 512"])).json()
    assert Path(own["path"]).with_suffix(".prompts.txt").read_text() == "a fox --w 512\n"
    refused = client.post("/api/new/check", json=body(space, prompts=["a\x1b[2Jb"]))
    assert refused.status_code == 422


@pytest.mark.parametrize(
    "values", [{"name": "../x"}, {"name": "a/b"}, {"model": "/etc/passwd"}, {"folder": "/etc"}]
)
def test_names_and_paths_stay_in_the_folders(
    client: TestClient, space: Workspace, asked: dict[str, Any], values: dict[str, str]
) -> None:
    assert client.post("/api/new/write", json=body(space, **values)).status_code in (404, 422)
    assert "new" not in asked


def test_thumbnails_are_small_and_kept(client: TestClient, space: Workspace, tmp_path: Path) -> None:
    picture = space.data[0] / "toys/1_toys/one.png"
    for _ in range(2):
        reply = client.get("/api/thumbnail", params={"path": str(picture), "size": 144})
        assert (reply.status_code, reply.headers["content-type"]) == (200, "image/jpeg")
    (kept,) = (space.home / "thumbnails").iterdir()
    with Image.open(kept) as small:
        assert small.size == (144, 72)
    assert client.get("/api/picture", params={"path": str(picture)}).content == picture.read_bytes()
    assert client.get("/api/thumbnail", params={"path": "/etc/passwd"}).status_code == 404
    model = str(space.models[0] / "base.safetensors")
    assert client.get("/api/thumbnail", params={"path": model}).status_code == 404


def test_the_speed_is_that_of_the_last_run_with_the_checkpoint(tmp_path: Path) -> None:
    base, recipe = tmp_path / "base.safetensors", tmp_path / "a.toml"
    recipe.write_text('[model]\nbase = "base.safetensors"\n[run]\nname = "a"\noutput = "o"\nbatch = 4\n')
    job = tmp_path / "jobs/1"
    job.mkdir(parents=True)
    record = JobRecord(
        id="1", title="a", command="train", values={"recipe": str(recipe)}, argv=["train", str(recipe)],
        cwd=str(tmp_path), created=1.0, queued=1.0, outputs=[],
    )  # fmt: skip
    record.write(job / JobRecord.FILE)
    steps = [{"event": "step", "seconds": seconds} for seconds in (2.0, 8.0, 2.0)]
    (job / "events.jsonl").write_text('cut"}\n' + "".join(f"{json.dumps(one)}\n" for one in steps))
    assert runs.seconds_per_picture(tmp_path / "jobs", base) == 0.5
    assert runs.seconds_per_picture(tmp_path / "jobs", tmp_path / "other.safetensors") is None
