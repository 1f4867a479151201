"""The password."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from spectune.studio import login
from spectune.studio.workspace import Workspace


@pytest.fixture
def locked(workspace: Workspace, browse: Callable[..., TestClient]) -> TestClient:
    workspace.password = "pässword"
    return browse(workspace)


def test_pages_lead_to_the_login_and_json_is_refused(locked: TestClient) -> None:
    response = locked.get("/settings")
    assert (response.status_code, response.headers["location"]) == (303, "/login")
    assert locked.get("/api/settings").status_code == 401
    assert locked.post("/api/settings", json={"theme": "dark"}).status_code == 401
    assert locked.get("/login").status_code == 200
    assert locked.get("/static/app.css").status_code == 200
    assert locked.get("/static/../settings").status_code == 303


def test_the_password_gives_a_session(locked: TestClient) -> None:
    response = locked.post("/login", data={"password": "pässword"})
    assert (response.status_code, response.headers["location"]) == (303, "/")
    cookie = response.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert locked.get("/settings").status_code == 200
    locked.cookies.clear()
    assert locked.get("/settings", headers={"cookie": f"{login.COOKIE}=wrong"}).status_code == 303
    assert locked.get("/settings", headers={"cookie": f"{login.COOKIE}="}).status_code == 303


@pytest.mark.parametrize("sent", [{}, {"password": ""}, {"password": "x" * 2000}, {"password": "\ud800"}])
def test_odd_passwords_are_refused(locked: TestClient, sent: dict[str, str]) -> None:
    data = {key: value.encode("utf-8", "surrogatepass") for key, value in sent.items()}
    assert locked.post("/login", data=data).status_code in (403, 422)


def test_wrong_passwords_slow_down(locked: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(login, "monotonic", lambda: now[0])
    codes = [locked.post("/login", data={"password": "wrong"}).status_code for _ in range(5)]
    assert codes == [403, 403, 403, 429, 429]
    right = locked.post("/login", data={"password": "pässword"})
    assert (right.status_code, right.headers["retry-after"]) == (429, "1")
    now[0] += 1.1
    assert locked.post("/login", data={"password": "wrong"}).status_code == 403
    now[0] += 1.1
    assert locked.post("/login", data={"password": "pässword"}).status_code == 429
    now[0] += 1.1
    assert locked.post("/login", data={"password": "pässword"}).status_code == 303


def test_another_site_cannot_log_in(locked: TestClient) -> None:
    headers = {"sec-fetch-site": "cross-site", "origin": "https://evil.example"}
    assert locked.post("/login", data={"password": "pässword"}, headers=headers).status_code == 403
