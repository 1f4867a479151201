"""Write to a temporary name beside the target, and rename when everything is complete."""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from spectune.errors import InputError

_TRIES, _PAUSE_SECONDS = 6, 0.3
_PARTIAL, _OLD, _REMOVED = ".partial", ".old", ".removed"


@contextmanager
def replacing(target: Path) -> Generator[Path]:
    """Give a path to write to, which becomes `target` after the block. A crash leaves the old file."""
    remove_leftovers(target)
    partial = partial_path(target)
    try:
        yield partial
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        rename(partial, target)
    except OSError as error:
        raise with_file(error, target) from None
    finally:
        with suppress(OSError):  # the error that the block raised is the one to report
            partial.unlink(missing_ok=True)


def replace_text(target: Path, text: str) -> None:
    """Write a text file in UTF-8, completely or not at all."""
    with replacing(target) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def with_file(error: OSError, target: Path) -> OSError:
    """Return the error of a failed write with the name of the target, which a full disk does not tell."""
    if error.filename is None and error.errno is not None:
        error.filename = os.fspath(target)
    return error


@contextmanager
def made_folder(folder: Path) -> Generator[None]:
    """Create a folder for the block; after an error, remove the created folders that are still empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for path in missing:
                path.rmdir()
        raise


def rename(source: Path, target: Path) -> None:
    """Give `source` the name of `target` and replace a file that has it.

    Virus scanners and indexers on Windows open new files for a moment, and a rename is refused meanwhile. Try
    again for about two seconds. Raises OSError if it is still refused.
    """
    for attempt in range(1, _TRIES + 1):
        try:
            source.replace(target)
            return
        except PermissionError:
            if attempt == _TRIES:
                raise
            time.sleep(_PAUSE_SECONDS)


def publish(source: Path, target: Path, *, force: bool) -> None:
    """Give a finished file its name. Raises InputError if another program has written it, without `force`."""
    if not force and os.name == "posix":
        try:  # unlike a check before a rename, a link cannot lose a race
            target.hardlink_to(source)
        except FileExistsError:
            raise _appeared(target) from None
        except OSError:  # this file system has no links
            pass
        else:
            source.unlink()
            return
    if not force and target.exists():
        raise _appeared(target)
    rename(source, target)


def _appeared(target: Path) -> InputError:
    return InputError(
        f"{target} exists: another program wrote it while this command ran",
        hint="pass `force` to overwrite it, or choose another `out`",
    )


def remove_whole(path: Path) -> None:
    """Remove a file or a folder. A crash never leaves a part of a folder under its name."""
    if path.is_dir():
        doomed = partial_path(path, _REMOVED)
        shutil.rmtree(doomed, ignore_errors=True)
        rename(path, doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------- temporary names


def partial_path(path: Path, suffix: str = _PARTIAL) -> Path:
    """Return the temporary name under which this process writes a file."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}{suffix}")


def old_path(path: Path) -> Path:
    """Return the name of a folder while this process replaces it."""
    return partial_path(path, _OLD)


def remove_leftovers(path: Path) -> None:
    """Remove temporary files of `path` left by killed processes of this machine; restore an old folder."""
    remove_leftovers_of(path.parent, re.escape(path.name))


def remove_leftovers_of(folder: Path, names: str) -> None:
    """Do the same for all targets in `folder` whose names match a pattern."""
    for suffix in (_OLD, _PARTIAL, _REMOVED):
        for leftover, name in leftovers(folder, names, suffix):
            if suffix == _OLD and not (folder / name).exists():
                rename(leftover, folder / name)
            elif leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def leftovers(folder: Path, names: str, suffix: str) -> Iterator[tuple[Path, str]]:
    """Yield the files with a temporary name of a killed process of this machine, and their final names."""
    pattern = re.compile(rf"\.(?P<name>{names})\.{_host()}-(?P<pid>\d+){re.escape(suffix)}")
    for path in folder.glob(f".*{suffix}"):
        match = pattern.fullmatch(path.name)
        if match is not None and not psutil.pid_exists(int(match["pid"])):
            yield path, match["name"]


def _host() -> str:
    """Return the name of this machine for temporary names: several machines may share a folder."""
    return re.sub(r"[^A-Za-z0-9]", "", platform.node())[:32] or "local"
