"""Hostile requests: all are refused with a 4xx, and nothing is read or written outside of the folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from spectune.studio.workspace import Workspace

SECRET = "top secret"
DEEP = b"[" * 100_000
Headers = dict[str, str]

TRAVERSALS = [
    "/static/../app.py",
    "/static/%2e%2e/app.py",
    "/static/..%2fapp.py",
    "/static/..%5capp.py",
    "/static/%2e%2e%2f%2e%2e%2f%2e%2e%2fetc/passwd",
    "/static/..%252fapp.py",
    "/static//etc/passwd",
    "/static/%2fetc/passwd",
    "/static/....//app.py",
    "/static/..;/app.py",
    "/static/%c0%ae%c0%ae/app.py",
    "/static/app.js%00.png",
    "/static/app.js::$DATA",
    "/static/CON",
    "/static/C:/Windows/win.ini",
    "/static/%5c%5cserver%5cshare",
    "/static/",
    "/templates/base.html",
    "/.env",
    "/%00",
    "/" + "a" * 20_000,
    "/settings?" + "a=b&" * 5_000,
]
FOREIGN: list[tuple[str, str, Headers]] = [
    ("GET", "/", {"host": "evil.example"}),
    ("GET", "/", {"host": "127.0.0.1.evil.example"}),
    ("GET", "/", {"host": "localhost.evil.example:7861"}),
    ("GET", "/", {"host": "evil.example:7861@127.0.0.1"}),
    ("GET", "/", {"host": ""}),
    ("GET", "/", {"host": "[::ffff:127.0.0.1]"}),
    ("GET", "/api/settings", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}),
    ("GET", "/api/settings", {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"}),
    ("GET", "/", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}),
    ("POST", "/api/settings", {"sec-fetch-site": "cross-site"}),
    ("POST", "/api/settings", {"sec-fetch-site": "same-site"}),
    ("POST", "/api/settings", {"sec-fetch-site": "SAME-ORIGIN, cross-site"}),
    ("POST", "/api/settings", {"origin": "https://evil.example"}),
    ("POST", "/api/settings", {"origin": "null"}),
    ("POST", "/api/settings", {"origin": "http://127.0.0.1:8188"}),
    ("POST", "/api/settings", {"sec-fetch-site": "none", "origin": "http://localhost:7861"}),
    ("PUT", "/api/settings", {}),
    ("DELETE", "/api/settings", {}),
    ("PATCH", "/", {}),
    ("OPTIONS", "/api/settings", {"sec-fetch-site": "cross-site", "access-control-request-method": "POST"}),
    ("TRACE", "/", {}),
    ("POST", "/", {}),
]
BODIES: list[tuple[bytes, str]] = [
    (b"", "application/json"),
    (b"{", "application/json"),
    (b"\xff\xfe\x00", "application/json"),
    (DEEP, "application/json"),
    (b'{"theme": "dark"}', "text/plain"),
    (b"theme=dark", "application/x-www-form-urlencoded"),
    (b'"dark"', "application/json"),
    (b'{"theme": 3}', "application/json"),
    (b'{"theme": "<script>"}', "application/json"),
    (b'{"themes": "dark"}', "application/json"),
    (b'{"models": "x"}', "application/json"),
    (b'{"models": [["x"]]}', "application/json"),
    (b'{"models": ["../../etc"]}', "application/json"),
    (b'{"models": ["\\u0000"]}', "application/json"),
    (b'{"models": ["/nowhere/at/all"]}', "application/json"),
    (b'{"models": ["C:\\\\Windows"]}', "application/json"),
    (b'{"models": ["\\\\\\\\server\\\\share"]}', "application/json"),
    (b'{"data": ["' + b"a" * 500_000 + b'"]}', "application/json"),
    (b'{"output": "\\ud800/x"}', "application/json"),
    (b'{"output": ""}', "application/json"),
    (b'{"models": [' + b'"/x",' * 200 + b'"/x"]}', "application/json"),
    (b" " * 1_000_001, "application/json"),
]


def test_there_are_at_least_forty() -> None:
    assert len(TRAVERSALS) + len(FOREIGN) + len(BODIES) >= 40


def check_refused(response: Any) -> None:
    assert 400 <= response.status_code < 500, response.text[:200]
    assert SECRET not in response.text


@pytest.mark.parametrize("path", TRAVERSALS, ids=lambda path: path[:40])
def test_no_path_leaves_the_static_files(client: TestClient, path: str) -> None:
    check_refused(client.get(path))


@pytest.mark.parametrize(("method", "path", "headers"), FOREIGN)
def test_other_sites_and_methods_are_refused(
    workspace: Workspace, client: TestClient, method: str, path: str, headers: Headers
) -> None:
    check_refused(client.request(method, path, headers=headers, json={"theme": "dark"}))
    assert workspace.settings.now.theme == "auto"


def test_without_the_headers_of_a_browser_nothing_changes(client: TestClient) -> None:
    for name in ("sec-fetch-site", "origin"):
        del client.headers[name]
    check_refused(client.post("/api/settings", json={"theme": "dark"}))


@pytest.mark.parametrize("headers", [{}, {"sec-fetch-site": ""}])
def test_a_page_of_the_studio_may_change_settings(
    workspace: Workspace, client: TestClient, headers: Headers
) -> None:
    """Over http from another computer, browsers send only `Origin`."""
    if headers:
        del client.headers["sec-fetch-site"]
    assert client.post("/api/settings", json={"theme": "dark"}).status_code == 200
    assert workspace.settings.now.theme == "dark"


def test_a_link_from_another_site_opens_a_page(client: TestClient) -> None:
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert client.get("/", headers=headers).status_code == 200


@pytest.mark.parametrize(("body", "kind"), BODIES, ids=range(len(BODIES)))
def test_wrong_bodies_are_refused(workspace: Workspace, client: TestClient, body: bytes, kind: str) -> None:
    check_refused(client.post("/api/settings", content=body, headers={"content-type": kind}))
    assert not workspace.settings.path.exists()


def test_a_body_without_a_length_is_counted(client: TestClient) -> None:
    def chunks() -> Any:
        for _ in range(20):
            yield b" " * 100_000

    response = client.post("/api/settings", content=chunks(), headers={"content-type": "application/json"})
    assert response.status_code == 413


def test_files_and_the_captions_of_an_undo_may_be_larger(client: TestClient) -> None:
    content = {"content": b" " * 2_000_000, "headers": {"content-type": "application/json"}}
    codes = [
        client.post(path, **content).status_code  # pyright: ignore[reportArgumentType]
        for path in ("/api/settings", "/api/data/captions", "/api/uploads/data")
    ]
    assert codes == [413, 422, 422]
    declared = {"content-length": "300000000"}
    assert client.post("/api/uploads/data", content=b"", headers=declared).status_code == 413


@pytest.mark.parametrize("length", ["-1", "1e3", "999999999999999999999", "1, 2"])
def test_a_wrong_length_is_refused(client: TestClient, length: str) -> None:
    check_refused(client.post("/api/settings", content=b"{}", headers={"content-length": length}))


def test_every_response_has_the_headers(client: TestClient) -> None:
    for path in ("/", "/static/app.css", "/nothing", "/api/nothing"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'self'; ")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "same-origin"
        assert headers["cross-origin-resource-policy"] == "same-origin"


def test_names_are_escaped(client: TestClient) -> None:
    text = client.get("/runs/%3Cscript%3Ealert(1)%3C/script%3E").text
    assert "<script>alert" not in text


def test_no_template_has_inline_code() -> None:
    folder = Path(__file__).parents[2] / "src" / "spectune" / "studio"
    for path in [*(folder / "templates").glob("*.html"), *(folder / "static").glob("*.js")]:
        text = path.read_text(encoding="utf-8")
        assert "innerHTML" not in text, path.name
        if path.suffix == ".html":
            assert " style=" not in text, path.name
            assert " onclick=" not in text, path.name
            assert "<script>" not in text, path.name
            assert "|safe" not in text.replace(" ", ""), path.name
            assert "http://" not in text, path.name
            assert "https://" not in text, path.name


def test_a_defect_is_a_500_without_details(
    client: TestClient, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ValueError(SECRET)

    monkeypatch.setattr(workspace, "places", fail)
    response = client.get("/api/settings")
    assert response.status_code == 500
    assert SECRET not in response.text
    assert response.json()["error"]["what"].endswith("ValueError")


def test_an_error_of_the_system_names_the_file(
    client: TestClient, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> None:
        raise OSError(28, "No space left on device", "/secret/place/settings.json")

    monkeypatch.setattr(workspace.settings, "change", fail)
    response = client.post("/api/settings", json={"theme": "dark"})
    assert response.status_code == 422
    assert response.json()["error"]["what"] == "settings.json: No space left on device"


def test_other_computers_cannot_change_the_folders(
    workspace: Workspace, browse: Callable[..., TestClient], tmp_path: Path
) -> None:
    workspace.remote = True
    client = browse(workspace)
    assert client.post("/api/settings", json={"models": [str(tmp_path)]}).status_code == 404
    assert client.post("/api/settings", json={"output": str(tmp_path / "new")}).status_code == 404
    assert not (tmp_path / "new").exists()
    assert client.post("/api/settings", json={"theme": "dark"}).status_code == 200
