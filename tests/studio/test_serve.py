"""The command: its options, addresses, and errors."""

from __future__ import annotations

import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from spectune.cli.app import run
from spectune.errors import InputError
from spectune.studio import serve


class Server:
    """A stand-in for uvicorn's server."""

    served: Any = None

    def __init__(self, config: Any) -> None:
        self.config = config

    def run(self, sockets: list[socket.socket]) -> None:
        Server.served = self.config.app.state.workspace
        for one in sockets:
            one.close()
        raise KeyboardInterrupt  # as uvicorn after Ctrl-C


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn

    monkeypatch.setattr(uvicorn, "Server", Server)
    monkeypatch.delenv(serve.PASSWORD_VARIABLE, raising=False)


def start(tmp_path: Path, *options: str) -> int:
    return run(["studio", "--no-browser", "--port", "0", "--home", str(tmp_path / "home"), *options])


def test_the_options_make_a_workspace(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    assert start(tmp_path, "--models", str(tmp_path / "a"), "--data", str(tmp_path / "a")) == 0
    made = Server.served
    assert (made.models, made.data) == ((tmp_path / "a",), (tmp_path / "a",))
    assert (made.remote, made.password) == (False, None)
    assert made.output == tmp_path / "home" / "output"
    assert "spectune studio: http://127.0.0.1:" in capfd.readouterr().err


def test_other_addresses_require_a_password(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(tmp_path, "--host", "0.0.0.0") == 2
    assert "it requires --password" in capfd.readouterr().err
    monkeypatch.setenv(serve.PASSWORD_VARIABLE, "secret")
    assert start(tmp_path, "--host", "0.0.0.0") == 0
    assert (Server.served.remote, Server.served.password) == (True, "secret")
    assert socket.gethostname().lower() in Server.served.hosts
    assert "0.0.0.0" not in Server.served.hosts
    assert "secret" not in capfd.readouterr().err


def test_a_missing_folder_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert start(tmp_path, "--models", str(tmp_path / "nothing")) == 2
    assert "nothing is not a folder" in capfd.readouterr().err


def test_a_port_in_use_names_the_address(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} of 127\.0\.0\.1 is in use by another program"):
            serve._listen("127.0.0.1", port)


@pytest.mark.parametrize(("server", "found"), [("spectune-studio", True), ("uvicorn", False)])
def test_a_second_start_opens_the_page_of_the_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], server: str, found: bool
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def version_string(self) -> str:
            return server

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as other:
        threading.Thread(target=other.handle_request, daemon=True).start()
        port = str(other.server_port)
        code = run(["studio", "--no-browser", "--port", port, "--home", str(tmp_path / "home")])
    text = capfd.readouterr().err
    assert code == (0 if found else 2)
    assert ("the Studio runs already" if found else "in use by another program") in text


def test_the_browser_opens_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The socket accepts connections before the browser opens."""
    opened: list[str] = []

    def open_page(url: str) -> bool:
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))).close()
        opened.append(url)
        return False

    def wait(self: Server, sockets: list[socket.socket]) -> None:
        while not opened:
            threading.Event().wait(0.01)
        sockets[0].close()

    monkeypatch.setattr(serve.webbrowser, "open", open_page)
    monkeypatch.setattr(Server, "run", wait)
    assert run(["studio", "--port", "0", "--home", str(tmp_path / "home")]) == 0
    text = ""
    for _ in range(100):
        text = capfd.readouterr().err
        if "no browser was found" in text:
            break
        threading.Event().wait(0.01)
    assert opened[0] in text


def test_without_the_extra_the_error_says_how_to_install_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert start(tmp_path) == 2
    text = capfd.readouterr().err
    assert "error: this needs uvicorn, which is not installed" in text
    assert 'hint: pip install "spectune[studio]"' in text
