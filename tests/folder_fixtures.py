"""Fixtures with a diffusers folder of the tiny SDXL."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.layouts import Modules
from tests.pipelines import save_pipeline


@pytest.fixture(scope="session")
def tiny_folder(tiny_modules: Modules, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny SDXL as diffusers saves it, in float32 (9 MB); use `folder` to change it."""
    return save_pipeline(tiny_modules, tmp_path_factory.mktemp("tiny_folder") / "tiny-xl")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny folder."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "tiny-xl"))
