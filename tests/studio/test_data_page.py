"""The page of pictures and captions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from spectune.studio.app import create_app
from spectune.studio.pages.data import OPENED
from spectune.studio.workspace import Workspace


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "cats"
    folder.mkdir(parents=True)
    for number, (name, size) in enumerate({"a": (64, 48), "b": (1024, 1024), "c": (900, 1200)}.items()):
        Image.new("RGB", size, (number * 50, 0, 0)).save(folder / f"{name}.png")
    (folder / "same.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "a.txt").write_text("a red cat, sitting\nsecond line", encoding="utf-8")
    (folder / "b.txt").write_text(", ".join(["tag"] * 200), encoding="utf-8")
    return folder


@pytest.fixture
def client(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    from spectune.studio.assistant import questions

    space = Workspace(tmp_path / "home", data=(folder.parent,), default_output=tmp_path / "output")

    def ask(question: str, values: Mapping[str, Any], *, topic: str | None = None) -> Any:
        return questions.reply(question, values, [str(root) for root in space.places().roots])

    monkeypatch.setattr(space, "ask", ask)
    monkeypatch.setattr(OPENED, "folder", None)
    return TestClient(
        create_app(space), base_url="http://127.0.0.1", headers={"sec-fetch-site": "same-origin"}
    )


def names(client: TestClient, folder: Path, **shown: str) -> list[str]:
    reply = client.get("/api/data/rows", params={"folder": str(folder), **shown}).json()
    assert reply["total"] == len(reply["rows"])
    return [row["name"] for row in reply["rows"]]


def test_filters_find_the_pictures_and_the_counts_agree(client: TestClient, folder: Path) -> None:
    facts = client.get("/api/data/open", params={"folder": str(folder)}).json()
    expected = {
        "all": ["a.png", "b.png", "broken.png", "c.png", "same.png"],
        "no_caption": ["broken.png", "c.png", "same.png"],
        "long": ["b.png"],
        "small": ["a.png", "same.png"],
        "cropped": [],
        "duplicate": ["a.png", "same.png"],
        "unreadable": ["broken.png"],
    }
    assert {name: names(client, folder, filter=name) for name in expected} == expected
    assert facts["filters"] == {name: len(found) for name, found in expected.items()}
    assert (facts["count"], facts["captioned"]) == (5, 2)
    assert sum(bar["value"] for bar in facts["buckets"]) == 4
    assert names(client, folder, search="RED cat") == ["a.png"]


def test_rows_come_in_parts(client: TestClient, folder: Path) -> None:
    part = client.get("/api/data/rows", params={"folder": str(folder), "start": 3, "count": 1}).json()
    assert (part["total"], [row["name"] for row in part["rows"]]) == (5, ["c.png"])


def test_a_caption_is_saved_and_the_reply_undoes_it(client: TestClient, folder: Path) -> None:
    names(client, folder)
    change = {"path": str(folder / "a.png"), "text": "a blue cat"}
    reply = client.post("/api/data/caption", json=change).json()
    assert reply == {"before": "a red cat, sitting\nsecond line", "tokens": 3}
    assert (folder / "a.txt").read_text(encoding="utf-8") == "a blue cat"
    assert names(client, folder, search="blue") == ["a.png"]
    undo = {"changes": [{"path": change["path"], "text": reply["before"]}]}
    assert client.post("/api/data/captions", json=undo).json() == {"changed": 1}
    assert (folder / "a.txt").read_text(encoding="utf-8").startswith("a red cat")


def test_a_first_caption_creates_the_file_and_its_undo_removes_it(client: TestClient, folder: Path) -> None:
    path = str(folder / "c.png")
    assert client.post("/api/data/caption", json={"path": path, "text": "new"}).json()["before"] is None
    assert (folder / "c.txt").exists()
    client.post("/api/data/captions", json={"changes": [{"path": path, "text": None}]})
    assert not (folder / "c.txt").exists()


def test_find_and_replace_counts_first_and_changes_what_is_shown(client: TestClient, folder: Path) -> None:
    wanted = {"folder": str(folder), "find": "cat", "replace": "dog"}
    assert client.post("/api/data/replace", json=wanted).json() == {"pictures": 1, "changes": []}
    assert (folder / "a.txt").read_text(encoding="utf-8").startswith("a red cat")
    done = client.post("/api/data/replace", json={**wanted, "apply": True}).json()
    assert (folder / "a.txt").read_text(encoding="utf-8") == "a red dog, sitting\nsecond line"
    client.post("/api/data/captions", json={"changes": done["changes"]})
    assert (folder / "a.txt").read_text(encoding="utf-8") == "a red cat, sitting\nsecond line"
    assert client.post("/api/data/replace", json={**wanted, "filter": "long"}).json()["pictures"] == 0


def test_only_pictures_in_the_folders_get_captions(client: TestClient, folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    Image.new("RGB", (8, 8)).save(outside)
    (folder / "weights.safetensors").write_bytes(b"x")
    for path, status in ((outside, 404), (folder / "weights.safetensors", 422), (folder / "none.png", 404)):
        reply = client.post("/api/data/caption", json={"path": str(path), "text": "x"})
        assert reply.status_code == status
    assert sorted(path.name for path in tmp_path.glob("*.txt")) == []


def test_added_files_keep_what_is_there_and_other_types_are_refused(client: TestClient, folder: Path) -> None:
    address = f"/api/uploads/data?folder={folder}"
    before = (folder / "a.png").read_bytes()
    reply = client.post(address, files=[("files", ("a.png", b"new", "image/png"))])
    assert reply.json() == {"added": ["a-2.png"]}
    assert (folder / "a.png").read_bytes() == before
    for name in ("run.exe", "con.png", "..png"):
        reply = client.post(address, files=[("files", (name, b"x", "image/png"))])
        assert reply.status_code in (404, 422), name
    reply = client.post(address, files=[("files", ("../../up.png", b"x", "image/png"))])
    assert reply.json() == {"added": ["up.png"]}
    assert (folder / "up.png").exists()
    assert "a-2.png" in names(client, folder), "the folder is read again"


def test_captions_in_other_encodings_are_restored_and_what_is_no_text_is_not_replaced(
    client: TestClient, folder: Path
) -> None:
    path = str(folder / "c.png")
    (folder / "c.txt").write_text("ein Würfel", encoding="utf-16")
    before = client.post("/api/data/caption", json={"path": path, "text": "a cube"}).json()["before"]
    assert before == "ein Würfel"
    client.post("/api/data/captions", json={"changes": [{"path": path, "text": before}]})
    assert (folder / "c.txt").read_text(encoding="utf-8") == "ein Würfel"
    (folder / "c.txt").write_bytes(b"a\x00\x00\x81\xff")
    kept = (folder / "c.txt").read_bytes()
    reply = client.post("/api/data/caption", json={"path": path, "text": "a cube"})
    assert reply.status_code == 422
    assert (folder / "c.txt").read_bytes() == kept
