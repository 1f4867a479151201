"""The settings of the Studio: the folders of the user and the theme, in a JSON file."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from spectune.errors import printable
from spectune.files.rename import replacing

LARGEST_BYTES = 1_000_000


class Settings(BaseModel):
    """What the user can set. Keys of other versions are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    models: tuple[Path, ...] = ()
    data: tuple[Path, ...] = ()
    output: Path | None = None  # None: the default folder
    theme: Literal["auto", "light", "dark"] = "auto"


class SettingsFile:
    """The settings in memory, and their file. A file that cannot be read counts as missing, with a notice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem = ""  # shown to the user
        self._lock = threading.Lock()
        self.now = self._read()

    def change(self, **values: Any) -> Settings:
        """Replace values and write the file."""
        with self._lock:
            changed = Settings.model_validate({**self.now.model_dump(), **values})
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as partial:
                partial.write_text(json.dumps(changed.model_dump(mode="json"), indent=1), encoding="utf-8")
            self.now, self.problem = changed, ""
        return changed

    def _read(self) -> Settings:
        if not self.path.exists():
            return Settings()
        try:
            if self.path.stat().st_size > LARGEST_BYTES:
                raise ValueError("the file is too large")
            return Settings.model_validate_json(self.path.read_bytes())
        except (OSError, ValueError, ValidationError) as error:
            self.problem = (
                f"The settings in {self.path} cannot be read and count as empty; saving replaces them. "
                f"({printable(str(error))})"
            )
            return Settings()
