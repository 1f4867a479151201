"""Pictures and captions in tar files in WebDataset's layout, read by their place in the file.

A member has a path like `00001.tar/1536+20480/cat.jpg`, with its offset and its length in bytes. So it is
named, hashed and opened like a file, and in any order.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

SUFFIX = ".tar"
MOST_BYTES = 256 * 1024**2  # of a member
MOST_HEADER_BYTES = 1024**2  # of the extended header of a member, which tarfile reads into memory
_PLACE = re.compile(r"(\d{1,18})\+(\d{1,18})")


@dataclass(frozen=True)
class Member:
    """A file in a tar file."""

    tar: Path
    offset: int  # of its content, in bytes
    length: int

    def read(self) -> bytes:
        """Return the content."""
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(min(self.length, MOST_BYTES))


@dataclass
class TarSample:
    """The members of a tar file that share a key: the name up to its first dot."""

    names: dict[str, str] = field(default_factory=dict[str, str])  # path of the member, by extension


def member_of(path: Path) -> Member | None:
    """Return the member that a path names, or None for the path of a file."""
    tar, place = path.parent.parent, _PLACE.fullmatch(path.parent.name)
    if place is None or tar.suffix.lower() != SUFFIX or tar.is_dir():
        return None
    return Member(tar, int(place[1]), int(place[2]))


def file_of(path: Path) -> Path:
    """Return the file on disk: the tar file of a member."""
    member = member_of(path)
    return path if member is None else member.tar


def open_bytes(path: Path) -> io.BufferedReader | io.BytesIO:
    """Open a file, or a member of a tar file, for reading."""
    member = member_of(path)
    return path.open("rb") if member is None else io.BytesIO(member.read())


def read_tar(tar: Path) -> tuple[list[TarSample], list[tuple[str, str]]]:
    """Return the samples of a tar file, and the (name, reason) of what is skipped.

    Names of members are paths below the folder of the tar file.
    """
    samples: dict[str, TarSample] = {}
    skipped: list[tuple[str, str]] = []
    try:
        with tar.open("rb") as file:
            size = tar.stat().st_size
            for info in _infos(file):
                name = PurePosixPath(info.name).name
                reason = _reason(info, size)
                key, _, extension = name.partition(".")
                sample = samples.setdefault(str(PurePosixPath(info.name).parent / key), TarSample())
                if reason is None and extension.lower() in sample.names:
                    reason = "repeats a name"
                if reason is not None:
                    skipped.append((f"{tar.name}/{name}", reason))
                elif key and extension:
                    place = f"{info.offset_data}+{info.size}"
                    sample.names[extension.lower()] = f"{tar.name}/{place}/{name}"
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
        skipped.append((tar.name, f"is damaged: {error}"))
    return list(samples.values()), skipped


def _infos(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(fileobj=cast("BinaryIO", _Headers(file)), mode="r:") as tar:
        while (info := tar.next()) is not None:
            cast("list[tarfile.TarInfo]", vars(tar)["members"]).clear()  # it would keep all that it has seen
            if not info.isdir():
                yield info


def _reason(info: tarfile.TarInfo, size: int) -> str | None:
    """Return why a member is skipped, or None."""
    if not info.isfile() or info.issparse():
        return "is a link or a special file"
    if info.size > MOST_BYTES:
        return f"has {info.size:,} bytes, more than {MOST_BYTES // 1024**2} MiB"
    if info.offset_data + info.size > size:
        return "is cut short"
    return None


class _Headers:
    """A file of which only headers are read: tarfile would read an extended header of any size."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.tell, self.seek = file.tell, file.seek

    def read(self, count: int) -> bytes:
        if count > MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header has {count:,} bytes")
        return self.file.read(count)
