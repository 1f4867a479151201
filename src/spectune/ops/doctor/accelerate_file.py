"""The configuration file of accelerate, which `accelerate config` writes for kohya's sd-scripts.

Only `accelerate launch` reads it. It passes the values on as environment variables.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from spectune.errors import printable

# Keys with a counterpart in recipes. `spectune train` takes the recipe's value.
IGNORED = {
    "mixed_precision": "run.precision",
    "gradient_accumulation_steps": "run.accumulation",
}
# Kinds of distributed training that `spectune train` can take part in.
SUPPORTED_KINDS = {"NO", "MULTI_GPU", "MULTI_CPU"}


@dataclass(frozen=True)
class AccelerateFile:
    """The values of the file that are of interest here."""

    path: Path
    mixed_precision: str = "no"
    processes: str = "1"
    kind: str = "NO"  # distributed_type
    compiles: bool = False  # it has a dynamo backend
    ignored: tuple[str, ...] = ()  # "mixed_precision (run.precision counts)"
    failure: str = ""  # why the file cannot be read


def find_accelerate_file() -> AccelerateFile | None:
    """Return the file that `accelerate launch` would read, None if there is none."""
    path = default_path()
    if not path.is_file():
        return None
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return AccelerateFile(path, failure=printable(str(error).replace("\n", " ")))
    if not isinstance(values, dict):
        return AccelerateFile(path, failure="expected keys with values")
    return _read(path, cast("Mapping[str, Any]", values))


def default_path() -> Path:
    """Return the path that accelerate uses if it gets no other."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(os.environ.get("HF_HOME", cache)).expanduser() / "accelerate" / "default_config.yaml"


def _read(path: Path, values: Mapping[str, Any]) -> AccelerateFile:
    section = values.get("dynamo_config")
    dynamo = cast("Mapping[str, Any]", section) if isinstance(section, dict) else values
    return AccelerateFile(
        path,
        mixed_precision=printable(str(values.get("mixed_precision") or "no")),
        processes=printable(str(values.get("num_processes", 1))),
        kind=printable(str(values.get("distributed_type", "NO"))),
        compiles=str(dynamo.get("dynamo_backend") or "no").lower() != "no",
        ignored=tuple(f"{key} ({counts} counts)" for key, counts in IGNORED.items() if key in values),
    )
