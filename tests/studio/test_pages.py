"""All pages: their size, their links, and what the server must not import."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from starlette.testclient import TestClient

from spectune.studio.rendering import NAVIGATION, STATIC

LARGEST_FIRST_LOAD = 60_000
PATHS = [path for path, _ in NAVIGATION]
IMPORT = re.compile(r'^import .* from "\./([\w.]+)"', re.MULTILINE)


def files_of(client: TestClient, text: str) -> dict[str, int]:
    """Return the sizes of all files that a page loads, also through imports."""
    waiting, sizes = re.findall(r'(?:src|href)="(/static/[^"]+)"', text), {}
    while waiting:
        path = waiting.pop()
        if path not in sizes:
            response = client.get(path)
            assert response.status_code == 200, path
            sizes[path] = len(response.content)
            if path.endswith(".js"):
                waiting += [f"/static/{name}" for name in IMPORT.findall(response.text)]
    return sizes


@pytest.mark.parametrize("path", PATHS)
def test_every_page_loads_and_is_small(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert f'<a href="{path}" aria-current="page">' in response.text
    assert len(response.content) + sum(files_of(client, response.text).values()) < LARGEST_FIRST_LOAD


def test_every_script_and_style_is_used(client: TestClient) -> None:
    templates = (STATIC.parent / "templates").glob("*.html")
    used = set().union(*(files_of(client, path.read_text(encoding="utf-8")) for path in templates))
    assert {f"/static/{path.name}" for path in STATIC.iterdir()} - used <= {"/static/charts.js"}


def test_every_input_has_a_label(client: TestClient) -> None:
    for path in PATHS:
        text = client.get(path).text
        labels = set(re.findall(r'<label\b[^>]*\bfor="([^"]+)"', text))
        for field in re.findall(r"<(?:input|select|textarea)\b[^>]*>", text):
            name = re.search(r'\bid="([^"]+)"', field)
            in_label = 'type="radio"' in field or 'type="checkbox"' in field or "aria-label" in field
            assert in_label or (name and name[1] in labels), (path, field)


def test_the_server_imports_neither_torch_nor_numpy_nor_pillow() -> None:
    code = f"""
import pathlib, sys, tempfile
from starlette.testclient import TestClient
import spectune.studio.serve
from spectune.studio.app import create_app
from spectune.studio.workspace import Workspace
with tempfile.TemporaryDirectory() as home:
    client = TestClient(create_app(Workspace(home=pathlib.Path(home))), base_url="http://127.0.0.1")
    print(*[client.get(path).status_code for path in {[*PATHS, "/runs/x", "/results/x", "/api/settings"]!r}])
print(sorted({{"torch", "numpy", "PIL", "transformers", "diffusers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    codes, heavy = done.stdout.splitlines()
    assert set(codes.split()) <= {"200", "404"}
    assert codes.split()[: len(PATHS)] == ["200"] * len(PATHS)
    assert heavy == "[]"
