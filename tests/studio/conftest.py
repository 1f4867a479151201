"""A Studio for tests: its folders, and a client that sends what a browser on its page sends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from spectune.studio.app import create_app
from spectune.studio.workspace import Workspace

ORIGIN = "http://127.0.0.1:7861"


@pytest.fixture(autouse=True)
def _no_user_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectune.files.model_folders.config.config_path", lambda: tmp_path / "none.toml")


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    for name in ("models", "pictures", "outside"):
        (tmp_path / name).mkdir()
    made = Workspace(home=tmp_path / "home", models=(tmp_path / "models",), data=(tmp_path / "pictures",))
    yield made
    made.assistant.close()


@pytest.fixture
def browse() -> Callable[..., TestClient]:
    """Return a function that makes a client of a workspace: `browse(workspace)`."""

    def make(workspace: Workspace, **headers: Any) -> TestClient:
        # without `with`: the lifespan would start the assistant
        sent = {"sec-fetch-site": "same-origin", "origin": ORIGIN, **headers}
        return TestClient(
            create_app(workspace), base_url=ORIGIN, headers=sent, raise_server_exceptions=False,
            follow_redirects=False,
        )  # fmt: skip

    return make


@pytest.fixture
def client(workspace: Workspace, browse: Callable[..., TestClient]) -> TestClient:
    return browse(workspace)
