"""Hostile values in every parameter and field of every route: no 500, nothing outside is read or written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import pytest
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.testclient import TestClient

from spectune.errors import InputError
from spectune.studio.workspace import Workspace

SECRET = "the content of a file outside"
QUICK = [
    "{outside}/secret.png",
    "{inside}/link/secret.txt",
    "<script>alert(1)</script>",
]
SLOW = [
    "{inside}/../outside/secret.txt",
    "{inside}/a.png\0.txt",
    "{outside}",
    "{outside}/secret.txt",
    "{inside}/%2e%2e/outside/secret.txt",
    "{inside}/link",
    "../../../../etc/passwd",
    "/etc/passwd",
    "//etc/passwd",
    "\\\\server\\share\\a.png",
    "C:\\Windows\\win.ini",
    "{inside}/NUL:stream",
    "file:///etc/passwd",
    "hub:owner/name",
    "a" * 3000,
    "-1",
    "1e999",
    "nan",
    "",
    "\u202e\r\nset-cookie: a=b",
    "\ud800",
    "{{ 7 * 7 }}",
    "--help; rm -rf .",
]


def routes_of(client: TestClient) -> Iterator[APIRoute]:
    waiting: list[Any] = list(cast("Any", client.app).routes)
    while waiting:
        route = waiting.pop()
        if isinstance(route, APIRoute):
            yield route
        waiting += getattr(getattr(route, "original_router", None), "routes", [])


def filled(model: type[BaseModel], value: Any) -> dict[str, Any]:
    """Return a body with the value in all fields, also in those of records in lists."""
    body: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind = str(field.annotation)
        inner = list(_models(field.annotation))
        one = filled(inner[0], value) if inner else value
        listed = kind.startswith(("list", "typing.List", "tuple")) or "list[" in kind
        body[name] = [one] if listed else {"model": one, "a": [one]} if kind.startswith("dict") else one
    return body


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models(inner)


@pytest.fixture
def prepared(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    outside, inside = tmp_path / "outside", tmp_path / "pictures"
    for name in ("secret.txt", "secret.png", "secret.safetensors"):
        (outside / name).write_text(SECRET, encoding="utf-8")
    (inside / "link").symlink_to(outside)
    (inside / "a.png").write_bytes(b"no picture")

    def ask(*_: Any, **__: Any) -> Any:
        raise InputError("the assistant is not asked here")

    monkeypatch.setattr(workspace.assistant, "ask", ask)
    monkeypatch.setattr(workspace.assistant, "start", lambda: None)
    monkeypatch.setattr("spectune.studio.pages.settings.choose_folder", lambda title: "")
    return workspace


def answers(client: TestClient, route: APIRoute, value: str) -> Iterator[Any]:
    """Send the value in all parameters, and in all fields of the body: alone, in a list, in an object."""
    plain = quote(value) if value and "/" not in value and value.isprintable() else "x"
    path = route.path
    for one in route.dependant.path_params:
        path = path.replace("{" + one.name + "}", plain)
    text = value.encode("utf-8", "surrogatepass")
    query = {one.name: text for one in route.dependant.query_params}
    models = [model for one in route.dependant.body_params for model in _models(one.field_info.annotation)]
    if "GET" in (route.methods or ()):
        yield client.get(path, params=query)
    elif models:
        for content in (value, [value], {"a": value}):
            body = json.dumps(filled(models[0], content))
            yield client.post(path, params=query, content=body, headers={"content-type": "application/json"})
    else:
        name = "../" + value.encode("ascii", "ignore").decode().replace("\0", "")[:200]
        yield client.post(
            path, params=query, files={"files": (name, b"\x89PNG", "image/png")}, data={"password": "x"}
        )


def problems_of(response: Any, where: str) -> Iterator[str]:
    """Yield what is wrong with a response to a hostile value."""
    where = f"{response.request.method} {where}: {response.status_code}"
    if response.status_code >= 500 or SECRET in response.text:
        yield f"{where} {response.text[:200]}"
    if "<script>alert(1)" in response.text and "html" in response.headers["content-type"]:
        yield f"{where} not escaped"
    if "set-cookie" in response.headers:
        yield f"{where} a header was injected"


@pytest.mark.parametrize("values", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["quick", "slow"])
def test_every_route_with_hostile_values(
    prepared: Workspace, browse: Callable[..., TestClient], tmp_path: Path, values: list[str]
) -> None:
    before = sorted((path, path.read_bytes()) for path in (tmp_path / "outside").iterdir())
    places = {"{outside}": str(tmp_path / "outside"), "{inside}": str(tmp_path / "pictures")}
    problems: list[str] = []
    with browse(prepared) as client:  # one event loop for all requests
        routes = list(routes_of(client))
        assert len(routes) > 10
        for route, value in product(routes, values):
            for name, folder in places.items():
                value = value.replace(name, folder)
            for response in answers(client, route, value):
                problems += problems_of(response, f"{route.path} {value[:60]!r}")
    assert problems == []
    assert sorted((path, path.read_bytes()) for path in (tmp_path / "outside").iterdir()) == before
    # only files with plain names were added, and only in the folders of the Studio
    assert {path.name for path in tmp_path.iterdir()} <= {"models", "pictures", "outside", "home"}
