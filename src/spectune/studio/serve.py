"""The command `spectune studio`: serve the page and open it in a browser."""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import socket
import threading
import webbrowser
from dataclasses import dataclass
from typing import Any

import psutil

from spectune.cli.console import print_note, say
from spectune.errors import InputError
from spectune.operation import operation
from spectune.ops.options.studio import LOOPBACK, PASSWORD_VARIABLE, StudioOptions

ANY_ADDRESS = ("0.0.0.0", "::")


@dataclass(frozen=True)
class StudioReport:
    """The address that was served."""

    url: str


@operation(StudioOptions)
def studio(options: StudioOptions) -> StudioReport:
    """Serve the page until Ctrl-C.

    Raises:
        InputError: A folder or a package is missing, the address needs a password, or the port is in use.
    """
    # A missing package of the extra becomes an InputError: see `operation`.
    import python_multipart  # noqa: F401  # pyright: ignore[reportUnusedImport]
    import uvicorn

    from spectune.studio.app import create_app

    password = options.password or os.environ.get(PASSWORD_VARIABLE) or None
    remote = options.host not in LOOPBACK
    if remote and password is None:
        raise InputError(
            f"`host` {options.host} lets other computers connect: it requires `password`",
            hint=f"pass `password`, or set the environment variable {PASSWORD_VARIABLE}",
        )
    workspace = _workspace(options, password, remote=remote)
    url = _url(options.host, options.port)
    if options.port and _serves_already(options.host, options.port):  # a second double click
        say(f"the Studio runs already: {url}")
        if options.browser:
            _open(url)
        return StudioReport(url)
    listener = _listen(options.host, options.port)
    url = _url(options.host, listener.getsockname()[1])
    config = uvicorn.Config(
        create_app(workspace), log_level="warning", access_log=False, server_header=False, ws="none",
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    say(f"spectune studio: {url}")
    say("Ctrl-C ends it; runs continue, and are there again at the next start.")
    if options.browser:
        threading.Thread(target=_open, args=(url,), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):  # the usual end; uvicorn raises it after it has closed
        uvicorn.Server(config).run(sockets=[listener])
    return StudioReport(url)


def show(report: StudioReport, options: StudioOptions, seconds: float) -> None:
    """Print nothing: the address was printed at the start."""


def _workspace(options: StudioOptions, password: str | None, *, remote: bool) -> Any:
    from spectune.studio.workspace import Workspace, default_home, default_output

    missing = [folder for folder in (*options.models, *options.data) if not folder.is_dir()]
    if missing:
        raise InputError(f"{missing[0]} is not a folder")
    home = (options.home or default_home()).absolute()
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"`home` {home} cannot be created: {error.strerror}") from error
    return Workspace(
        home=home,
        models=tuple(folder.absolute() for folder in options.models),
        data=tuple(folder.absolute() for folder in options.data),
        hosts=_hosts(options.host),
        password=password,
        remote=remote,
        default_output=None if options.home else default_output(),
    )


def _hosts(host: str) -> tuple[str, ...]:
    """Return the names under which browsers may address the server."""
    if host not in ANY_ADDRESS:
        return tuple(dict.fromkeys((*LOOPBACK, host.lower())))
    addresses = [address.address for card in psutil.net_if_addrs().values() for address in card]
    name = socket.gethostname().lower()
    return tuple(dict.fromkeys((*LOOPBACK, name, f"{name}.local", *addresses)))


def _serves_already(host: str, port: int) -> bool:
    """Return whether a Studio listens on the port."""
    from spectune.studio.security import SERVER

    address = "127.0.0.1" if host in ANY_ADDRESS else host.strip("[]")
    connection = http.client.HTTPConnection(address, port, timeout=2)
    try:
        connection.request("HEAD", "/static/icon.svg")
        return connection.getresponse().getheader("server") == SERVER
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address. Raises InputError if the port is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    if os.name != "nt":  # on Windows, this option would let two servers share the port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
        listener.listen()  # so that the browser waits until the server is ready
    except OSError as error:
        listener.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise InputError(
                f"port {port} of {host} is in use by another program", hint="pass another `port`: 7862"
            ) from error
        raise InputError(f"cannot listen on `host` {host}: {error.strerror}") from error
    return listener


def _url(host: str, port: int) -> str:
    shown = "127.0.0.1" if host in ANY_ADDRESS else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"


def _open(url: str) -> None:
    """Open the page in a browser."""
    if not webbrowser.open(url):
        print_note(f"no browser was found: open {url}")
