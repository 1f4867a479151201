"""A Studio with files of its own, and a real browser that counts clicks. See CONTRIBUTING.md."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BROWSER_VARIABLE = "SPECTUNE_CHROMIUM"
START_SECONDS = 120.0
PICTURES = 8
# the controls without a name for screen readers
UNLABELED = """() => [...document.querySelectorAll("input, select, textarea, button")]
    .filter((one) => !one.labels?.length && !one.ariaLabel && !one.textContent.trim())
    .filter((one) => !one.querySelector("img[alt]:not([alt=''])"))
    .map((one) => one.outerHTML)"""


@dataclass
class Studio:
    """A server process, and its folders."""

    folder: Path
    url: str = ""
    port: int = 0  # of the first start, so that a new server has the same address
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start the server and wait until it has printed its address."""
        log = self.folder / "server.log"
        folders = {"home": "home", "models": "models", "data": "pictures"}
        words = ["--no-browser", "--port", str(self.port)]
        words += [word for name, path in folders.items() for word in (f"--{name}", str(self.folder / path))]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "spectune", "studio", *words],
                stdout=out, stderr=out, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            )  # fmt: skip
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if match := re.search(r"http://[\d.]+:(\d+)", log.read_text(encoding="utf-8")):
                self.url, self.port = match[0], int(match[1])
                return
            assert self.process.poll() is None, log.read_text(encoding="utf-8")
            time.sleep(0.2)
        raise AssertionError(f"the server did not start within {START_SECONDS:g} seconds")

    def stop(self) -> None:
        """End the server. Its jobs continue."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(timeout=30)


@contextmanager
def serving(folder: Path) -> Iterator[Studio]:
    """Serve the demo's base and some of its pictures from `folder`."""
    pictures = folder / "pictures" / "toys"
    for path in (folder / "models", pictures):
        path.mkdir(parents=True)
    shutil.copy(ROOT / "demo" / "base.safetensors", folder / "models")
    for picture in sorted((ROOT / "demo/images/10_emoji3d").glob("*.webp"))[:PICTURES]:
        for file in (picture, picture.with_suffix(".txt")):
            shutil.copy(file, pictures)
    studio = Studio(folder)
    studio.start()
    try:
        yield studio
    finally:
        studio.stop()


@contextmanager
def open_page(url: str) -> Iterator[Any]:
    """Open a page in Chromium: the one of SPECTUNE_CHROMIUM, the system's, or that of Playwright.

    An error in a script of the page fails the test.
    """
    from playwright.sync_api import sync_playwright

    errors: list[str] = []
    program = os.environ.get(BROWSER_VARIABLE) or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as tools:
        # Without its sandbox, Chromium also starts in containers; it opens only pages of this test.
        browser = tools.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.set_default_timeout(120_000)
        page.goto(url)
        yield page
        browser.close()
    assert errors == []


@dataclass
class Clicks:
    """Clicks on a page, counted."""

    page: Any
    count: int = 0

    def __call__(self, name: str, *, role: str = "button") -> None:
        """Click on what a user calls `name`."""
        self.page.get_by_role(role, name=name, exact=True).first.click()
        self.count += 1


@dataclass(frozen=True)
class Shots:
    """Screenshots into a folder; without one, none are made."""

    page: Any
    folder: Path | None

    def __call__(self, name: str, *, width: int = 1200, dark: bool = False) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.emulate_media(color_scheme="dark" if dark else "light")
        self.page.screenshot(path=self.folder / f"{name}.png", full_page=True)
        self.page.set_viewport_size({"width": 1200, "height": 900})
        self.page.emulate_media(color_scheme="light")
