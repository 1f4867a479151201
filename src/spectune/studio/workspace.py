"""What all pages share: the folders, the settings, the assistant, the jobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import platformdirs

from spectune.errors import InputError
from spectune.files.model_folders.config import read_model_folders
from spectune.ops.options.studio import LOOPBACK
from spectune.studio.assistant.client import Assistant
from spectune.studio.jobs.queue import JobQueue
from spectune.studio.places import Places
from spectune.studio.settings import SettingsFile


@dataclass
class Workspace:
    """One Studio: its folder, and the folders and hosts of the command line."""

    home: Path
    models: tuple[Path, ...] = ()
    data: tuple[Path, ...] = ()
    hosts: tuple[str, ...] = LOOPBACK  # accepted in the `Host` header
    password: str | None = None
    remote: bool = False  # other computers can connect; then no page changes the folders
    default_output: Path | None = None
    assistant: Assistant = field(init=False)
    jobs: JobQueue = field(init=False)

    def __post_init__(self) -> None:
        self.assistant = Assistant(log=self.home / "assistant.log")
        self.jobs = JobQueue(self.home / "jobs", places=self.places, check=self._check_job)

    @cached_property
    def settings(self) -> SettingsFile:
        return SettingsFile(self.home / "settings.json")

    @property
    def output(self) -> Path:
        """Return the folder for runs and what is built of them."""
        return self.settings.now.output or self.default_output or self.home / "output"

    def places(self) -> Places:
        """Return the folders that pages may use: the settings, the command line, and the model folders."""
        saved = self.settings.now
        return Places(
            models=_unique(*self.models, *saved.models, *_configured()),
            data=_unique(*self.data, *saved.data),
            output=self.output,
        )

    def ask(self, question: str, values: Mapping[str, Any], *, topic: str | None = None) -> Any:
        """Return the assistant's answer to a question. It opens only files in the folders.

        A newer question with the same `topic` cancels this one, if it still waits.
        """
        return self.assistant.ask(question, values, roots=self.places().roots, topic=topic)

    def _check_job(self, command: str, values: Mapping[str, Any]) -> None:
        """Raise InputError if the recipe of a training is wrong, or names a file outside of the folders."""
        if command != "train":
            return
        recipe = Path(str(values["recipe"]))
        sections = self.ask("recipe_values", {"path": str(recipe)})["values"]
        found = self.ask("check", {"values": sections, "folder": str(recipe.parent), "quick": True})
        for problem in found["problems"]:
            raise InputError(f"{recipe.name}: {problem['key']}: {problem['what']}", hint=problem["hint"])


def default_home() -> Path:
    """Return the folder for settings and jobs."""
    return Path(platformdirs.user_data_dir("spectune", appauthor=False)) / "studio"


def default_output() -> Path:
    """Return the folder for runs: users look for it, so it is not hidden."""
    return Path(platformdirs.user_documents_dir()) / "spectune"


def _configured() -> tuple[Path, ...]:
    """Return the model folders of the configuration file that the command line reads too."""
    try:
        return read_model_folders().present
    except InputError:  # `spectune doctor` and every command that needs the file report it
        return ()


def _unique(*folders: Path) -> tuple[Path, ...]:
    return tuple({folder.absolute(): None for folder in folders})
