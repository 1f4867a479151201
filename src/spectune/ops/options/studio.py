"""Options of the page in the browser."""

from __future__ import annotations

from dataclasses import KW_ONLY
from pathlib import Path

from spectune.operation import OperationOptions, option, record

PASSWORD_VARIABLE = "SPECTUNE_STUDIO_PASSWORD"  # of the environment
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")  # names of this computer


@record
class StudioOptions(OperationOptions):
    """Open spectune as a page in the browser: train, watch runs, see results, and use all tools by clicks.

    The page is served to this computer only, unless `host` is passed. Ctrl-C ends the server; runs continue.
    """

    _: KW_ONLY
    port: int = option(default=7861, ge=0, le=65535, help="Port of the page. 0 takes a free port.")
    host: str = option(
        default="127.0.0.1",
        help="Address to listen on. Other computers can open the page with 0.0.0.0; it requires `password`.",
    )
    password: str | None = option(
        default=None,
        help=f"Ask for this password. Default: the environment variable {PASSWORD_VARIABLE}, if set.",
    )
    home: Path | None = option(
        default=None,
        help="Folder for settings and jobs. Default: the folder of the system for the data of programs.",
    )
    models: tuple[Path, ...] = option(
        default=(), help="A folder of checkpoints, in addition to those in the settings."
    )
    data: tuple[Path, ...] = option(
        default=(), help="A folder of pictures, in addition to those in the settings."
    )
    browser: bool = option(
        default=True,
        off=("--no-browser", "Do not open the page in a browser."),
        help="Open the page in a browser.",
    )
