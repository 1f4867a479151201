"""The folders that the pages may use. No request reaches a path outside of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath

from spectune.errors import SpectuneError, printable

LONGEST_PATH, LONGEST_NAME, LONGEST_NEW_NAME = 4096, 255, 200  # characters, bytes, bytes
_FORBIDDEN_IN_NAMES = re.compile(r'[<>:"/\\|?*]')
# Windows opens a device for these names, with any extension.
_DEVICES = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(COM|LPT)[0-9¹²³])(\..*)?", re.IGNORECASE)


class Refused(SpectuneError):
    """A request for a path that the pages may not use."""


@dataclass(frozen=True)
class Places:
    """The folders of the user. `inside` turns a text of a request into a path in one of them."""

    models: tuple[Path, ...]  # checkpoints and adapters
    data: tuple[Path, ...]  # pictures and captions
    output: Path  # runs and what is built of them

    @property
    def roots(self) -> tuple[Path, ...]:
        """Return all folders, the ones for output first."""
        return (self.output, *self.models, *self.data)

    def inside(self, text: str, roots: Iterable[Path] | None = None) -> Path:
        """Return the resolved path of `text`, which need not exist.

        Args:
            text: An absolute path, as a page showed it.
            roots: The folders to accept. Default: all of them.

        Raises:
            Refused: The path is not absolute, not plain, or leaves the folders, also through a link.
        """
        allowed = tuple(self.roots if roots is None else roots)
        path = plain_path(text)
        # Before the file system sees it: on Windows, asking for a path on another computer sends a login.
        if not any(path.is_relative_to(form) for root in allowed for form in (root, root.resolve())):
            raise _outside(text)
        try:
            resolved = Path(path).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise Refused(f"{printable(text)} cannot be opened") from error
        if not any(resolved.is_relative_to(root.resolve()) for root in allowed):
            raise Refused(
                f"{printable(text)} is a link to {printable(str(resolved))}, outside of the folders",
                hint="add the folder that the link leads to in Settings",
            )
        return resolved

    def file(self, text: str, roots: Iterable[Path] | None = None) -> Path:
        """Return the path of an existing file. Raises Refused otherwise."""
        path = self.inside(text, roots)
        if not os.path.isfile(path):  # noqa: PTH113  # Path.is_file raises without permission
            raise Refused(f"{printable(text)} is not a file")
        return path

    def folder(self, text: str, roots: Iterable[Path] | None = None) -> Path:
        """Return the path of an existing folder. Raises Refused otherwise."""
        path = self.inside(text, roots)
        if not os.path.isdir(path):  # noqa: PTH112
            raise Refused(f"{printable(text)} is not a folder")
        return path


def plain_path(text: str, *, windows: bool = os.name == "nt") -> PurePath:
    """Return an absolute path without detours. Raises Refused for all others; the file system is not used."""
    if len(text) > LONGEST_PATH:
        raise Refused(f"the path is {len(text):,} characters long: expected at most {LONGEST_PATH:,}")
    if any(ord(character) < 32 for character in text):
        raise Refused(f"the path {printable(text)} contains a control character")
    path = (PureWindowsPath if windows else PurePosixPath)(text)
    if not path.is_absolute():
        raise Refused(f"{printable(text)} is not an absolute path")
    names = path.parts[1:]
    if ".." in names:
        raise Refused(f"{printable(text)} contains ..")
    if any(len(name.encode("utf-8", "surrogatepass")) > LONGEST_NAME for name in names):
        raise Refused(f"{printable(text)} has a name of more than {LONGEST_NAME} bytes")
    if windows:
        odd = [name for name in names if ":" in name or _DEVICES.fullmatch(name) or name[-1] in ". "]
        if odd or path.drive.startswith(("\\\\?\\", "\\\\.\\")):
            raise Refused(f"{printable(text)} is not the path of a plain file")
    return path


def plain_name(text: str) -> str:
    """Return a name for a new file or folder. Raises Refused unless it is one plain name on all systems."""
    problem = ""
    if not text or text.startswith(".") or text[-1] in ". " or text != text.strip():
        problem = "empty, or begins or ends with a dot or a space"
    elif not text.isprintable() or _FORBIDDEN_IN_NAMES.search(text):
        problem = 'not a plain name: it contains a control character or one of < > : " / \\ | ? *'
    elif _DEVICES.fullmatch(text):
        problem = "the name of a device on Windows"
    elif len(text.encode("utf-8", "surrogatepass")) > LONGEST_NEW_NAME:
        problem = f"longer than {LONGEST_NEW_NAME} bytes"
    if problem:
        raise Refused(f"the name `{printable(text, 60)}` is {problem}")
    return text


def _outside(text: str) -> Refused:
    return Refused(
        f"{printable(text)} is outside of the folders of the Studio", hint="add its folder in Settings"
    )
