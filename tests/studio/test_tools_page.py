"""The forms of the commands on files."""

from __future__ import annotations

import html
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from spectune.studio.app import create_app
from spectune.studio.forms import OUTPUT_NAMES, TOOLS, free_path, tool_of
from spectune.studio.workspace import Workspace


@pytest.fixture
def client(tmp_path: Path, tiny_checkpoint: Path) -> TestClient:
    space = Workspace(tmp_path / "home", models=(tiny_checkpoint.parent,), default_output=tmp_path / "output")
    return TestClient(create_app(space), base_url="http://127.0.0.1")


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_has_a_form_with_a_label_for_each_field(client: TestClient, name: str) -> None:
    page = client.get(f"/tools/{name}")
    assert page.status_code == 200
    for control in tool_of(name, Path("/output")).controls:
        assert f'id="f-{control.name}"' in page.text
        assert control.help in html.unescape(page.text), control.name
        if control.kind != "check":
            assert f'<label for="f-{control.name}">{control.label}</label>' in page.text


def test_what_a_command_writes_goes_to_the_output_folder_under_a_free_name(tmp_path: Path) -> None:
    (tmp_path / "rebuilt.safetensors").touch()
    (tmp_path / "rebuilt-2.safetensors").touch()
    assert free_path(tmp_path / "rebuilt.safetensors").name == "rebuilt-3.safetensors"
    for (tool, field), name in OUTPUT_NAMES.items():
        (control,) = [one for one in tool_of(tool, tmp_path / "new").controls if one.name == field]
        assert (control.value, control.main, control.kind) == (str(tmp_path / "new" / name), True, "text")


def test_limits_choices_and_defaults_are_those_of_the_record() -> None:
    controls = {one.name: one for one in tool_of("split", Path("/output")).controls}
    assert (controls["rank"].kind, controls["rank"].minimum, controls["rank"].whole) == ("number", 1, True)
    assert controls["svd"].choices == ("auto", "exact", "gram", "sketch")
    assert (controls["model"].kind, controls["model"].required, controls["model"].main) == (
        "file",
        True,
        True,
    )
    assert not controls["dtype"].main
    assert controls["with_residual"].default == "true"


def test_a_link_fills_the_form_and_its_values_are_escaped(client: TestClient) -> None:
    page = client.get("/tools/inspect", params={"model": '"><script>alert(1)</script>'}).text
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert" not in page


def test_the_files_to_choose_from_are_those_in_the_folders(client: TestClient, tiny_checkpoint: Path) -> None:
    assert str(tiny_checkpoint) in client.get("/api/tools/files").json()["files"]
    assert client.get("/tools/doctor").status_code == 404
