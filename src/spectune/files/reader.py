"""Read tensors by name from safetensors files, one at a time. Pickles are never opened."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeGuard, cast

import torch
from torch import Tensor

from spectune.core.linalg import empty
from spectune.errors import InputError, check_all, some_of
from spectune.files.dtypes import DTYPES_BY_SAFETENSORS_NAME
from spectune.files.provenance import HasProvenance
from spectune.files.source import TensorFile, TensorInfo
from spectune.files.text import load_json

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
INDEX_SUFFIX = ".index.json"
MODEL_INDEX = "model_index.json"  # marks a diffusers folder
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
# SDXL has 2,515 tensors, and no kind of adapter more than ten for each of its 1,052 layers. A header with
# 100,000 takes 3 seconds to read.
MOST_TENSORS = 30_000
MOST_COMMAS = 10 * MOST_TENSORS  # limits the values in a header before they are parsed into 60 bytes each
MOST_AXES = 16
LARGEST_SIZE = 2**63  # bytes; torch counts in 64 bits
DOWNLOAD_AGAIN = "the file is damaged or has the wrong extension: download or copy it again"
USE_SAFETENSORS = "use the .safetensors version of the model, or convert it in a sandbox"
# How other files begin: what they are, and what to do.
_OTHER_FILES: Mapping[tuple[bytes, ...], tuple[str, str]] = {
    (b"GGUF",): (
        "a GGUF file, whose weights are quantized",
        "use the .safetensors version of the model in fp16, bf16, fp32 or fp8",
    ),
    (b"PK\3\4", b"\x80"): ("a zip archive or a pickle", USE_SAFETENSORS),
    (b"version https://git-lfs",): ("a git-lfs pointer", "install git-lfs to get the file"),
    (b"<!doctype", b"<html"): ("a web page", "download the file again; it may require a login"),
}


@dataclass(frozen=True)
class _Header:
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    offsets: dict[str, int]  # position in the file where each tensor begins, in bytes


class SafetensorsFile:
    """One open safetensors file.

    Tensors are read into memory, not mapped. So memory use is what the caller holds, and a file that shrinks
    while it is read causes an error message instead of a crash.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.paths = (path,)
        self._lock = threading.Lock()
        self._file = open_binary(path)
        self._version = version_of(self._file)
        try:
            header = _read_header(self._file, path)
        except BaseException:
            self._file.close()
            raise
        self.metadata = header.metadata
        self.tensors = header.tensors
        self._offsets = header.offsets

    def load(self, name: str) -> Tensor:
        info = self.tensors[name]
        data = empty((info.nbytes,), torch.uint8)
        with self._lock:
            self._file.seek(self._offsets[name])
            count = self._file.readinto(data.numpy().data)
        if count != info.nbytes:
            raise InputError(
                f"{self.path.name} ended inside tensor {name}: expected {info.nbytes} bytes, got {count}",
                hint="the file was probably changed while it was read: try again",
            )
        check_unchanged(self._file, self._version, self.path)
        return data.view(info.dtype).view(info.shape)

    def offset_of(self, name: str) -> int:
        """Return the position in the file where a tensor begins, in bytes."""
        return self._offsets[name]

    def close(self) -> None:
        self._file.close()


class Checkpoint(HasProvenance):
    """An open checkpoint of one or several files; a context manager."""

    def __init__(
        self,
        path: Path,
        files: Sequence[TensorFile],
        metadata: Mapping[str, str],
        *,
        label: str | None = None,
        file_names: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.file_names = file_names or {}  # names in the file, for tensors that were renamed on opening
        self.label = path.name if label is None else label
        self.metadata = metadata
        self._files = files
        self._file_of = {name: file for file in files for name in file.tensors}
        self.tensors: Mapping[str, TensorInfo] = {n: i for file in files for n, i in file.tensors.items()}

    def load(self, name: str) -> Tensor:
        return self._file_of[name].load(name)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Return every file that is read, including the index of shards and the diffusers folder itself."""
        return tuple(dict.fromkeys([self.path, *(path for file in self._files for path in file.paths)]))

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_file(path: Path, *, label: str | None = None) -> Checkpoint:
    """Open one `.safetensors` file; messages call it `label`, by default its file name."""
    if path.suffix.lower() in PICKLES:
        raise InputError(
            f"{path.name} is a pickle, which can run any program when it is opened; spectune never opens "
            "pickles",
            hint=USE_SAFETENSORS,
        )
    file = SafetensorsFile(path)
    return Checkpoint(path, [file], file.metadata, label=label)


def open_binary(path: Path) -> BufferedReader:
    """Open a file for reading bytes; raise InputError if that fails."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except (OSError, ValueError) as error:  # ValueError: the path contains a character that no path has
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from error


def version_of(file: BufferedReader) -> tuple[int, int]:
    """Return the size of an open file and the time of its last change."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def check_unchanged(file: BufferedReader, version: tuple[int, int], path: Path) -> None:
    """Raise InputError if a file has changed since `version`: its tensors may be of two versions."""
    if version_of(file) != version:
        raise InputError(
            f"{path.name} was changed by another program while it was read", hint="run the command again"
        )


def _read_header(file: BufferedReader, path: Path) -> _Header:
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        file.seek(0)
        raise _not_safetensors(path, file.read(64).lstrip())
    try:
        raw = file.read(length)
        if raw.count(b",") > MOST_COMMAS:
            raise ValueError(f"it lists more than {MOST_TENSORS:,} tensors")
        header = load_json(raw, unique=True)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise InputError(f"the header of {path.name} is invalid: {error}", hint=DOWNLOAD_AGAIN) from None
    return _parse_header(cast(dict[str, Any], header), path, start=8 + length, size=size)


def _not_safetensors(path: Path, head: bytes) -> InputError:
    page = head.lower() if head.startswith(b"<") else head
    kinds = (found for signs, found in _OTHER_FILES.items() if page.startswith(signs))
    kind, hint = next(kinds, ("", DOWNLOAD_AGAIN))
    return InputError(f"{path.name} is not a safetensors file{kind and f': it is {kind}'}", hint=hint)


def _parse_header(header: dict[str, Any], path: Path, *, start: int, size: int) -> _Header:
    metadata = cast(object, header.pop("__metadata__", None) or {})
    if not _is_table_of_strings(metadata):
        raise InputError(f"the metadata of {path.name} is not a table of strings", hint=DOWNLOAD_AGAIN)
    if len(header) > MOST_TENSORS:
        raise InputError(
            f"{path.name} lists {len(header):,} tensors: expected at most {MOST_TENSORS:,}",
            hint=DOWNLOAD_AGAIN,
        )
    # an empty tensor begins at the same byte as the next one: sort it first
    spans = sorted(
        check_all(header.items(), lambda item: _span(*item, path)),
        key=lambda span: (span.begin, span.info.nbytes),
    )
    end = 0
    for span in spans:
        if span.begin != end:
            raise InputError(
                f"the header of {path.name} leaves a gap before {span.info.name}", hint=DOWNLOAD_AGAIN
            )
        end += span.info.nbytes
    if start + end != size:
        raise InputError(
            f"{path.name} is {'cut short' if size < start + end else 'too long'}: "
            f"expected {start + end} bytes according to its header, got {size}",
            hint=DOWNLOAD_AGAIN,
        )
    return _Header(
        metadata=metadata,
        tensors={span.info.name: span.info for span in spans},
        offsets={span.info.name: start + span.begin for span in spans},
    )


def _is_table_of_strings(value: object) -> TypeGuard[dict[str, str]]:
    return isinstance(value, dict) and all(isinstance(v, str) for v in cast(dict[str, Any], value).values())


@dataclass(frozen=True)
class _Span:
    info: TensorInfo
    begin: int  # bytes after the header


def _integer(value: object) -> int:
    if type(value) is not int:
        raise TypeError
    return value


def _span(name: str, entry: Any, path: Path) -> _Span:
    try:
        dtype, shape = entry["dtype"], tuple(_integer(n) for n in entry["shape"])
        begin, end = (_integer(n) for n in entry["data_offsets"])
        if not isinstance(dtype, str) or "\0" in name:
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"the header of {path.name} has an invalid entry for tensor {name}", hint=DOWNLOAD_AGAIN
        ) from None
    if dtype not in DTYPES_BY_SAFETENSORS_NAME:
        raise InputError(
            f"tensor {name} of {path.name} has the unsupported dtype {dtype}",
            hint=f"expected one of {', '.join(DTYPES_BY_SAFETENSORS_NAME)}",
        )
    info = TensorInfo(name, DTYPES_BY_SAFETENSORS_NAME[dtype], shape)
    # also of an empty tensor: torch multiplies the other sizes
    size = info.dtype.itemsize * math.prod(max(n, 1) for n in shape[:MOST_AXES])
    if len(shape) > MOST_AXES or size >= LARGEST_SIZE:
        raise InputError(
            f"tensor {name} of {path.name} has the impossible shape {some_of([*map(str, shape)], 8)}",
            hint=DOWNLOAD_AGAIN,
        )
    if min(shape, default=0) < 0 or end - begin != info.nbytes:
        raise InputError(
            f"tensor {name} of {path.name}: expected {info.nbytes} bytes for {dtype} {shape}, "
            f"got {end - begin}",
            hint=DOWNLOAD_AGAIN,
        )
    return _Span(info, begin)
