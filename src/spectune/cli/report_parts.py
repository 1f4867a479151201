"""Output that several commands share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectune.adapters.loading import Loading
from spectune.cli.console import megabytes, say, table
from spectune.files.reader import INDEX_SUFFIX
from spectune.model.device import describe_device, drawing_dtype, parse_device
from spectune.ops.options.pictures import DrawingOptions


def say_device(options: DrawingOptions) -> None:
    """Print the device of an operation that draws, its memory, the build of torch and the dtype."""
    device = parse_device(options.device)
    dtype = str(drawing_dtype(device)).removeprefix("torch.")
    say(f"drawing on {describe_device(device)}, {dtype} model")


def written(path: Path, seconds: float) -> str:
    """Return a line with the written file, its size and the time."""
    size = megabytes(sum(part.stat().st_size for part in _files_of(path)))
    return f"wrote {path}  ({size}, {seconds:.1f} s)"


def _files_of(path: Path) -> list[Path]:
    """Return the files of a folder or of a sharded checkpoint, or the file itself."""
    if path.is_dir():
        return [file for file in path.rglob("*") if file.is_file()]
    if not path.name.endswith(INDEX_SUFFIX):
        return [path]
    shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
    return [path, *(path.with_name(name) for name in dict.fromkeys(shards))]


def percent(share: float) -> str:
    """Format a share as a percentage. A small share above zero is never shown as zero."""
    return "less than 0.001%" if 0 < share < 1e-5 else f"{share:.3%}"


_LOADING_COLUMNS = ("program", "loads", "ignores", "note")


def loading_table(title: str, programs: Sequence[Loading]) -> None:
    """Print what other programs load from a file and what they ignore."""
    table(title, _LOADING_COLUMNS, [program.row for program in programs], left=4)


def loading_json(programs: Sequence[Loading]) -> list[dict[str, Any]]:
    """Return the rows of `loading_table` as JSON records."""
    return [dict(zip(_LOADING_COLUMNS, program.row, strict=True)) for program in programs]
