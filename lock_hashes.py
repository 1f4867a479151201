#!/usr/bin/env python3
"""Write requirements.hashes: the SHA-256 of every file that pip may install for a pin of the lock files.

    .venv/bin/python lock_hashes.py

Run it after a change of a lock file. It asks pip's package index about the pinned packages. torch is
left out: its builds are on indexes of their own.
"""

from __future__ import annotations

import json
import re
import sys
import urllib.request

from pip._internal.models.index import PyPI
from pip._vendor.packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename

import dev

JSON = "application/vnd.pypi.simple.v1+json"
# The platforms of tests/test_repository.py: Linux, Windows on x86-64, macOS on Apple silicon.
PLATFORM = re.compile(r"any|(many|musl)linux.*_(x86_64|aarch64)|macosx_.*_(arm64|universal2)|win_amd64")
PYTHON = re.compile(r"py3|py2\.py3|cp3(1[1-9]|[2-9]\d)|py3\d+")


def is_usable(name: str, version: str) -> bool:
    """Return whether a file of a package has this version and fits a platform and a Python of spectune."""
    try:
        if not name.endswith(".whl"):
            return str(parse_sdist_filename(name)[1]) == version
        _, found, _, tags = parse_wheel_filename(name)
    except ValueError:
        return False
    fits = (
        PLATFORM.fullmatch(tag.platform) and (tag.abi == "abi3" or PYTHON.fullmatch(tag.interpreter))
        for tag in tags
    )
    return str(found) == version and any(fits)


def hashes_of(pin: str) -> list[str]:
    """Return the hashes of the usable files of `name==version`."""
    name, _, version = pin.partition("==")
    request = urllib.request.Request(
        f"{PyPI.simple_url}/{canonicalize_name(name)}/", headers={"Accept": JSON}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        files = json.load(answer)["files"]
    return sorted(file["hashes"]["sha256"] for file in files if is_usable(file["filename"], version))


def main() -> None:
    """Write the file."""
    pins = sorted({dev.pin_of(line) for line in dev.read_lock(dev.DEV_LOCK)})
    lines = [" ".join([pin, *hashes_of(pin)]) for pin in pins if not pin.startswith("torch==")]
    (dev.ROOT / dev.HASHES).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    print(f"{len(lines)} packages", file=sys.stderr)


if __name__ == "__main__":
    main()
